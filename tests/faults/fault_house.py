"""A gateway in this process, workers of hash values in processes of their own, load, and what must hold."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import uvloop
from fault_engine import SHAPE

from headrace.api.workers import WORKER_COMMAND
from headrace.cluster import GatewayObserver, LocalCluster
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.cluster.registry import Member
from headrace.config.engine import Connector
from headrace.protocol.messages import ImportSettled, Role
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams
from headrace.sim.hash_executor import HashModel
from headrace.sim.hash_model import expected
from headrace.sim.shape import EngineShape
from headrace.worker import WorkerOptions
from headrace.worker.process import ProcessOptions
from headrace.world import real_world
from headrace.world.launcher import LocalLauncher

ENGINE = (sys.executable, str(Path(__file__).with_name("fault_engine.py")))
ROLES = {"prefill-1": Role.PREFILL, "decode-1": Role.DECODE, "decode-2": Role.DECODE}
THRESHOLD = 64
LAPSE_S = 2.0
STEP_TIMEOUT_S = 1.5
LIMIT_S = 100.0


class Tally(GatewayObserver):
    """Counts what went on elsewhere, and what was transferred."""

    def __init__(self) -> None:
        self.replays = 0
        self.transfers = 0
        self.failed_transfers = 0
        self.read_blocks = 0
        """Those that came over NIXL."""

    def replayed(self, request: GenerateRequest) -> None:
        self.replays += 1

    def handed_over(self, request: GenerateRequest, settled: ImportSettled) -> None:
        self.transfers += settled.imported
        self.failed_transfers += not settled.imported
        self.read_blocks += settled.read if settled.imported else 0


class FaultHouse:
    """One cluster, from `start` to `stop`."""

    def __init__(self, connector: Connector, shape: EngineShape) -> None:
        self.shape = shape
        self.connector = connector
        self.tally = Tally()
        self.lines: list[str] = []
        self.local = LocalCluster(
            real_world(),
            {name: self._launcher(name, role) for name, role in ROLES.items()},
            observer=self.tally,
            options=GatewayOptions(
                split=SplitPolicy(prompt_length_threshold=THRESHOLD),
                heartbeat_s=0.25,
                suspect_after_s=1.0,
                lapse_s=LAPSE_S,
            ),
            report=self.lines.append,
        )
        self._model = HashModel(self.shape.vocab_size, self.shape.eos_token_ids)
        self.done = 0
        """Requests whose every sample has ended."""

    def _launcher(self, name: str, role: Role) -> LocalLauncher:
        options = ProcessOptions(
            worker=WorkerOptions(
                worker_id=name,
                role=role,
                data_address="127.0.0.1:0",
                step_timeout_s=STEP_TIMEOUT_S,
                connector=self.connector,
                check_reads=True,
            ),
            engine=msgspec.Raw(msgspec.json.encode(self.shape)),
            engine_command=ENGINE,
        )
        return LocalLauncher(WORKER_COMMAND, msgspec.json.encode(options), self.lines.append)

    # ---- processes -----------------------------------------------------------------------------------

    def member(self, name: str) -> Member:
        member = self.local.gateway.registry.get(name)
        assert member is not None, f"{name} is unknown: {self.lines}"
        return member

    def engine(self, name: str) -> psutil.Process:
        return psutil.Process(self.member(name).info.engine.pid)

    def agent(self, name: str) -> psutil.Process:
        """The process in which the worker's NIXL agent lives."""
        found = [p for p in self.supervisor(name).children() if "headrace.world.nixl_process" in p.cmdline()]
        assert len(found) == 1, (name, found)
        return found[0]

    def supervisor(self, name: str) -> psutil.Process:
        parent = self.engine(name).parent()
        assert parent is not None
        return parent

    # ---- load ----------------------------------------------------------------------------------------

    def requests(self, count: int, seed: int) -> list[GenerateRequest]:
        """Short and long prompts, one and two samples, greedy and drawn, with and without probabilities."""
        generator = random.Random(seed)
        found = []
        for number in range(count):
            length = generator.choice([5, 40, 150, 300])
            drawn = number % 3 == 0
            sampling = SamplingParams(
                max_tokens=generator.randrange(10, 60),
                ignore_eos=number % 2 == 0,
                n=2 if number % 5 == 0 else 1,
                temperature=0.8 if drawn else 0.0,
                seed=number,
                logprobs=2 if number % 4 == 0 else None,
            )
            prompt = [generator.randrange(10, self.shape.vocab_size) for _ in range(length)]
            found.append(GenerateRequest(request_id=f"r{number}", prompt=prompt, sampling=sampling))
        return found

    async def ask(self, request: GenerateRequest) -> None:
        """Send a request; every sample must bring what it brings undisturbed, and end once."""
        count = request.sampling.n
        tokens: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[object]] = [[] for _ in range(count)]
        endings: list[list[FinishReason]] = [[] for _ in range(count)]
        async for outputs in self.local.gateway.submit(request):
            for output in outputs:
                assert not endings[output.index], f"{request.request_id} goes on after its end"
                tokens[output.index] += output.tokens
                logprobs[output.index] += output.logprobs or []
                if output.finish is not None:
                    endings[output.index].append(output.finish.reason)
                    assert output.finish.error is None, (request.request_id, output.finish, self.lines)
        for index in range(count):
            right = expected(request, index, self._model, self.shape.max_model_len)
            assert tokens[index] == right.tokens, (request.request_id, index)
            assert logprobs[index] == (right.logprobs or []), (request.request_id, index)
            assert len(endings[index]) == 1
        self.done += 1

    async def serve_all(self, requests: list[GenerateRequest], at_once: int) -> None:
        room = asyncio.Semaphore(at_once)

        async def one(request: GenerateRequest) -> None:
            async with room:
                await self.ask(request)

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(one(request))

    # ---- what must hold ------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}; {self._state()}"
            await asyncio.sleep(0.02)

    def _state(self) -> list[object]:
        workers = [(m.worker_id, m.state, m.why_down, m.stats) for m in self.local.gateway.registry]
        return [*workers, *self.lines[-10:]]

    async def wait_nothing_held(self) -> None:
        """No request is open, and no worker that lives holds a block, or keeps one for another."""
        gateway = self.local.gateway
        await self.until(lambda: gateway.open_samples == 0, "every ending")
        live = list(gateway.registry.live())
        await self.until(
            lambda: all(
                m.stats is None
                or not (m.stats.blocks_held or m.stats.blocks_leased or m.stats.blocks_quarantined)
                for m in live
            ),
            "every block back",
        )
        assert all(not m.legs and not m.open_samples and not m.exports for m in live), self._state()


def in_fault_house(
    body: Callable[[FaultHouse], Awaitable[None]],
    connector: Connector = "tcp",
    shape: EngineShape = SHAPE,
) -> None:
    """Run `body` beside a started cluster; no process may be left after it."""

    async def main() -> None:
        house = FaultHouse(connector, shape)
        async with asyncio.timeout(LIMIT_S):
            try:
                await house.local.start()
                await body(house)
            finally:
                await house.local.stop()

    before = set(psutil.Process().children(recursive=True))
    uvloop.run(main())
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not alive, f"left behind: {alive}"
