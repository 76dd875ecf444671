"""A gateway and a worker on hash values, wired up in a simulated or in the real world, for tests of both."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import uvloop

from headrace.cluster import Gateway, GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.stream import OutputStream
from headrace.engine import Engine, SchedulerConfig, StepPlan, StepResult
from headrace.protocol.messages import EngineInfo
from headrace.protocol.requests import Finish, GenerateRequest, SamplingParams
from headrace.sim import Crash, Simulation, run
from headrace.sim.hash_executor import expected_tokens, hash_engine, model_of
from headrace.sim.launcher import TaskLauncher
from headrace.worker import Supervisor, WorkerOptions, serve
from headrace.world import World, real_world

WORLDS = ("virtual", "asyncio", "uvloop")
HEARTBEAT_S = 0.1
REAL_TIMEOUT_S = 30.0


@dataclass
class EngineShape:
    """What a test's engine is like. Times in seconds of the world's clock."""

    max_model_len: int = 256
    vocab_size: int = 1000
    eos_token_ids: frozenset[int] = frozenset({7})
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_waiting: int = 100
    num_blocks: int = 200
    block_size: int = 4
    step_s: float = 0.0
    depth: int = 1

    def build(self) -> tuple[Engine, EngineInfo]:
        config = SchedulerConfig(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            steps_in_flight=self.depth,
        )
        engine = hash_engine(
            config, num_blocks=self.num_blocks, block_size=self.block_size, step_s=self.step_s
        )
        info = EngineInfo(
            model="hash",
            revision="0",
            numerics="exact",
            dtype="uint64",
            batch_invariant=True,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            block_bytes=self.block_size * 8,
            weight_bytes=0,
            prefix_caching=True,
            kv_layout="hash",
            threads=1,
            pid=1,
        )
        return engine, info


@dataclass
class House:
    """One gateway, and engines that dial in to it one after another."""

    shape: EngineShape
    world: World
    simulation: Simulation | None
    gateway: Gateway
    engine_address: str
    engine: Engine | None = None
    worker: asyncio.Task[None] | None = None
    engines: TaskLauncher | None = None
    steps: int = 0
    """Steps that engines have begun, all of them together."""
    break_at: int | None = None
    """The step at which the engine's executor raises."""
    background: list[asyncio.Task[Any]] = field(default_factory=list)

    def start_worker(self) -> asyncio.Task[None]:
        """Let a new worker dial in."""
        world = self.worker_world()
        self.engines = TaskLauncher(lambda address: self._engine(world, address))
        options = WorkerOptions(worker_id="w", join=(self.gateway.address,))
        supervisor = Supervisor(world, options, self.engines, self.engine_address)
        self.worker = asyncio.create_task(supervisor.run(), name="worker")
        return self.worker

    async def _engine(self, world: World, address: str) -> None:
        self.engine, info = self.shape.build()
        submit = self.engine.executor.submit

        def counted(plan: StepPlan) -> asyncio.Future[StepResult]:
            self.steps += 1
            if self.steps == self.break_at:
                raise FloatingPointError("a kernel went wrong")
            return submit(plan)

        self.engine.executor.submit = counted  # type: ignore[method-assign]
        await serve(world, address, self.engine, info)

    def worker_world(self) -> World:
        return self.simulation.world("worker") if self.simulation else self.world

    async def kill_worker(self, how: Crash = Crash.RESET) -> None:
        """The worker's machine dies without a word."""
        assert self.worker is not None
        assert self.engines is not None
        if self.simulation:
            self.simulation.network.crash_host("worker", how)
        for process in self.engines.processes:
            process.task.cancel()
        self.worker.cancel()
        await asyncio.gather(self.worker, return_exceptions=True)
        if self.simulation:
            self.simulation.network.restart_host("worker")

    async def lost(self) -> None:
        """Wait until the gateway has no worker."""
        while any(True for _ in self.gateway.registry.live()):
            await self.gateway.wait_changed()

    async def grow_old(self) -> None:
        """Wait until the gateway knows all workers that there are, and waits for no other."""
        await asyncio.sleep(2.1 * HEARTBEAT_S)

    def expected(self, request: GenerateRequest, index: int = 0) -> list[int]:
        assert self.engine is not None
        return expected_tokens(request, index, model_of(self.engine), self.shape.max_model_len)

    def assert_nothing_held(self) -> None:
        """The engine has no request, and every block is free or merely cached."""
        assert self.engine is not None
        scheduler = self.engine.scheduler
        assert not list(scheduler.sequences())
        assert not self.engine.has_work
        assert scheduler.cache.pool.held == 0
        scheduler.cache.pool.check()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that no event announces; fails after five seconds of the world's time."""
        deadline = self.world.now() + 5.0
        while not condition():
            assert self.world.now() < deadline, f"{what} did not come about within 5 s"
            await asyncio.sleep(0.001)


def in_house(
    kind: str,
    body: Callable[[House], Awaitable[None]],
    shape: EngineShape | None = None,
    *,
    observer: GatewayObserver | None = None,
    options: GatewayOptions | None = None,
    seed: int = 0,
) -> str:
    """Run `body` with a gateway and a connected engine; returns the trace hash of a simulated run."""
    shape = shape or EngineShape()

    async def live(world: World, simulation: Simulation | None, address: str, engine: str) -> None:
        asked = replace(options or GatewayOptions(), heartbeat_s=HEARTBEAT_S)
        gateway = Gateway(world, observer, asked)
        house = House(shape, world, simulation, gateway, engine)
        await gateway.listen(address, own=True)
        try:
            house.start_worker()
            await gateway.wait_ready()
            await body(house)
        finally:
            await gateway.drain(0.0, dismiss=("w",))
            assert house.worker is not None
            house.worker.cancel()
            await asyncio.gather(house.worker, *house.background, return_exceptions=True)

    if kind == "virtual":

        async def simulated(simulation: Simulation) -> None:
            await live(simulation.world("gateway"), simulation, "gateway:7000", "worker:7100")

        return run(simulated, seed=seed, max_virtual_s=1000.0).trace_hash

    async def real() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with asyncio.timeout(REAL_TIMEOUT_S):
                place = f"unix:{directory}"
                await live(real_world(), None, f"{place}/gateway.sock", f"{place}/engine.sock")

    factory = uvloop.new_event_loop if kind == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(real())
    return ""


async def collect(stream: OutputStream) -> dict[tuple[str, int], tuple[list[int], Finish]]:
    """Read a stream to its end: tokens and ending of every sample; a second ending fails."""
    tokens: dict[tuple[str, int], list[int]] = {}
    endings: dict[tuple[str, int], Finish] = {}
    async for outputs in stream:
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in endings, f"{key} goes on after its ending"
            tokens.setdefault(key, []).extend(output.tokens)
            if output.finish is not None:
                endings[key] = output.finish
    return {key: (tokens[key], endings[key]) for key in tokens}


def request(name: str, generator: random.Random | None = None, **sampling: Any) -> GenerateRequest:
    """A request; with a generator, of random prompt and sampling. `prompt` may be given too."""
    prompt = sampling.pop("prompt", None)
    if generator is None:
        params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
        return GenerateRequest(
            request_id=name, prompt=prompt or [1, 2, 3, 4, 5], sampling=SamplingParams(**params)
        )
    shared = [generator.randrange(3)] * 12
    prompt = prompt or shared + [generator.randrange(1000) for _ in range(generator.randrange(1, 30))]
    params = {
        "max_tokens": generator.randrange(1, 30),
        "temperature": generator.choice([0.0, 1.0]),
        "n": generator.choice([1, 1, 1, 2, 3]),
        "seed": generator.randrange(1 << 32),
        **sampling,
    }
    return GenerateRequest(request_id=name, prompt=prompt, sampling=SamplingParams(**params))
