"""A worker has its data address before its engine loads anything, and says in words when it cannot."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from headrace.protocol.engine_messages import PoolInfo
from headrace.sim import Simulation, run
from headrace.sim.launcher import TaskLauncher
from headrace.worker import CannotStartError, EngineLostError, Supervisor, WorkerOptions, serve
from headrace.world import Connection, ConnectionLost, Memory, World

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import EngineShape

OPTIONS = WorkerOptions(worker_id="w", join=(), data_address="w:2")


async def worker(world: World, launched: Callable[[], None], options: WorkerOptions = OPTIONS) -> None:
    """Run a worker whose engine says that it has a pool."""

    async def engine(address: str) -> None:
        launched()
        built, info = EngineShape().build()
        pool = PoolInfo("/nowhere", 100, info.block_bytes, info.block_size)
        await serve(world, address, built, info, pool)

    await Supervisor(world, options, TaskLauncher(engine), "w:1").run()


async def nobody(connection: Connection) -> None:
    pass


@pytest.mark.parametrize("address", ["w:2", "elsewhere:2", "no address"])
def test_an_address_that_cannot_be_had_is_said_before_the_engine_is_launched(address: str) -> None:
    async def main(simulation: Simulation) -> None:
        launches: list[None] = []
        world = simulation.world("w")
        await world.network.listen("w:2", nobody, plain=True)
        options = msgspec.structs.replace(OPTIONS, data_address=address)
        with pytest.raises(CannotStartError, match="--data-address cannot be had: .*" + address):
            await worker(world, lambda: launches.append(None), options)
        assert not launches

    run(main, max_virtual_s=100.0)


def test_memory_that_cannot_be_had_is_said() -> None:
    async def main(simulation: Simulation) -> None:
        def refuse(path: str, size: int) -> Memory:
            raise OSError(f"cannot open shared memory at {path}")

        world = replace(simulation.world("w"), open_memory=refuse)
        with pytest.raises(EngineLostError, match="did not start: its KV blocks: cannot open shared memory"):
            await worker(world, lambda: None)

    run(main, max_virtual_s=100.0)


def test_who_dials_before_the_engine_stands_is_let_go_and_the_address_is_free_afterwards() -> None:
    async def main(simulation: Simulation) -> None:
        world = simulation.world("w")
        launched = asyncio.Event()

        async def engine(address: str) -> None:
            launched.set()
            await asyncio.sleep(1000.0)

        running = asyncio.create_task(Supervisor(world, OPTIONS, TaskLauncher(engine), "w:1").run())
        await launched.wait()
        connection = await simulation.world("x").network.connect("w:2", timeout_s=1.0, plain=True)
        with pytest.raises((ConnectionLost, asyncio.IncompleteReadError)):
            await connection.read_exactly(1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await (await world.network.listen("w:2", nobody, plain=True)).close()

    run(main, max_virtual_s=100.0)
