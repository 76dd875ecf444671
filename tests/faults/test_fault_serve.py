"""`headrace serve` with a real model, prefill and decode apart, while its processes are killed and stopped.

Each stream must equal what the same server answered undisturbed: text, log-probabilities, ending.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asks import Answer, ask, asks

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from served import Served

OPTIONS = ("--prefill", "1", "--decode", "2", "--batch-invariant", "--prompt-length-threshold", "64")
MEMORY = ("--kv-cache-memory", "64MiB", "--max-model-len", "1024")
REQUESTS = 200
KINDS = 20
AT_ONCE = 8
KILL_EVERY_S = 3.0
LIMIT_S = 280.0


class Cluster(Served):
    """A server with three workers."""

    def __init__(self, model: Path) -> None:
        super().__init__(model, *OPTIONS, *MEMORY)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the server says of each worker, by name."""
        found = httpx.get(f"{self.url}/cluster", timeout=10).json()["workers"]
        return {worker["id"]: worker for worker in found}

    def process_of(self, name: str, kind: str) -> psutil.Process:
        """A worker's engine, or the supervisor above it."""
        engine = psutil.Process(self.workers()[name]["pid"])
        parent = engine.parent()
        assert parent is not None
        return engine if kind == "engine" else parent

    def all_up(self) -> bool:
        workers = self.workers()
        return len(workers) == 3 and all(worker["state"] == "up" for worker in workers.values())

    async def wait_up(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not await asyncio.to_thread(self.all_up):
            assert time.monotonic() < deadline, (self.workers(), self.lines)
            await asyncio.sleep(0.1)

    async def wait_nothing_held(self) -> None:
        """No sequence is open, and no worker holds a block or keeps one for another."""
        deadline = time.monotonic() + 40  # longer than a lease
        while True:
            answer = (await asyncio.to_thread(httpx.get, f"{self.url}/cluster")).json()
            held = [w["blocks"][n] for w in answer["workers"] for n in ("held", "leased", "quarantined")]
            if not answer["open_sequences"] and not any(held):
                return
            assert time.monotonic() < deadline, answer
            await asyncio.sleep(0.1)


class Load:
    """Streams, compared with what came undisturbed."""

    def __init__(self, server: Cluster, client: httpx.AsyncClient, kinds: int) -> None:
        self._server = server
        self._client = client
        self._bodies = asks(kinds)
        self._undisturbed: list[list[Answer]] = []
        self.done = 0
        self.open: set[int] = set()

    async def record(self) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(body: dict[str, Any]) -> list[Answer]:
            async with room:
                return await ask(self._client, self._server.url, body)

        self._undisturbed = await asyncio.gather(*(one(body) for body in self._bodies))

    async def run(self, requests: int) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                self.open.add(number)
                kind = number * 7 % len(self._bodies)
                answers = await ask(self._client, self._server.url, self._bodies[kind])
                self.open.discard(number)
                assert answers == self._undisturbed[kind], f"request {number} of kind {kind}"
                self.done += 1

        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(one(number))


async def beside(load: Awaitable[None], chaos: Awaitable[None]) -> None:
    """Run the load to its end, and the chaos for as long; an error of either ends both."""
    serving, breaking = asyncio.ensure_future(load), asyncio.ensure_future(chaos)
    try:
        await asyncio.wait({serving, breaking}, return_when=asyncio.FIRST_COMPLETED)
        if breaking.done():
            breaking.result()
        await serving
    finally:
        for task in (serving, breaking):
            task.cancel()
        await asyncio.gather(serving, breaking, return_exceptions=True)


def in_cluster(model: Path, body: Callable[[Cluster, Load], Awaitable[None]], kinds: int = KINDS) -> None:
    async def main(server: Cluster) -> None:
        async with asyncio.timeout(LIMIT_S), httpx.AsyncClient() as client:
            load = Load(server, client, kinds)
            await load.record()
            await body(server, load)

    with Cluster(model) as server:
        asyncio.run(main(server))


@pytest.mark.timeout(300)
def test_streams_hold_while_decode_workers_are_killed(smollm2_dir: Path) -> None:
    kills: list[str] = []

    async def body(server: Cluster, load: Load) -> None:
        async def kill() -> None:
            while True:
                await asyncio.sleep(KILL_EVERY_S)
                await server.wait_up()
                name, kind = f"decode-{1 + len(kills) // 2 % 2}", ("engine", "supervisor")[len(kills) % 2]
                victims = set(load.open)
                (await asyncio.to_thread(server.process_of, name, kind)).send_signal(signal.SIGKILL)
                kills.append(f"{name} {kind}")
                while victims & load.open:  # a request survives one death, not two
                    await asyncio.sleep(0.05)

        async def serve() -> None:
            await load.run(REQUESTS)
            while len(kills) < 2:  # a quick machine is done before
                await load.run(AT_ONCE)

        await beside(serve(), kill())
        assert load.done >= REQUESTS
        await server.wait_up()
        metrics = await asyncio.to_thread(server.metrics)
        assert metrics["request_replays_total"] > 0
        assert metrics.get("ended:error", 0) == 0
        await server.wait_nothing_held()

    in_cluster(smollm2_dir, body)


@pytest.mark.timeout(200)
def test_a_gateway_that_stands_still_is_let_go_and_gets_its_workers_back(smollm2_dir: Path) -> None:
    """Longer than its sessions last: the workers cancel what it had, and it replays that."""

    async def body(server: Cluster, load: Load) -> None:
        async def stand_still() -> None:
            while load.done < AT_ONCE:
                await asyncio.sleep(0.02)
            server.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(12.0)
            finally:
                server.signal(signal.SIGCONT)
            await asyncio.get_running_loop().create_future()

        await beside(load.run(40), stand_still())
        await server.wait_up()
        await server.wait_nothing_held()

    in_cluster(smollm2_dir, body)


@pytest.mark.timeout(200)
def test_a_terminated_server_lets_its_streams_end(smollm2_dir: Path) -> None:
    async def body(server: Cluster, load: Load) -> None:
        serving = asyncio.create_task(load.run(AT_ONCE))
        while (
            len(load.open) < AT_ONCE or not (await asyncio.to_thread(server.workers))["decode-1"]["running"]
        ):
            assert not serving.done(), "the load was over too soon"
            await asyncio.sleep(0.01)
        server.signal(signal.SIGTERM)
        await serving
        assert load.done == AT_ONCE
        assert await asyncio.to_thread(server.wait_end) == 0

    in_cluster(smollm2_dir, body, AT_ONCE)


@pytest.mark.timeout(200)
def test_nothing_outlives_a_killed_server(smollm2_dir: Path) -> None:
    async def body(server: Cluster, load: Load) -> None:
        serving = asyncio.create_task(load.run(AT_ONCE))
        while len(load.open) < AT_ONCE:
            await asyncio.sleep(0.01)
        children = server.gateway.children(recursive=True)
        assert len(children) >= 6  # a supervisor and an engine for each worker, and NIXL's where that is had
        server.signal(signal.SIGKILL)
        with pytest.raises(ExceptionGroup):
            await serving
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 5)
        assert not alive, f"left behind: {alive}"
        server.process.wait(5)

    in_cluster(smollm2_dir, body, 1)
