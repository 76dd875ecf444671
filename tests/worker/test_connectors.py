"""What a worker does where it cannot have the connector that it was asked for, and where it may not try."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from headrace.config.engine import Connector
from headrace.protocol.engine_messages import PoolInfo
from headrace.sim import Simulation, run
from headrace.sim.cluster import SharedBytes
from headrace.sim.launcher import TaskLauncher
from headrace.sim.shape import EngineShape, executor_of
from headrace.worker import CannotStartError, Supervisor, WorkerOptions, serve
from headrace.world import AgentUnavailable, MemoryAgent, World


async def refuse(
    path: str, size: int, address: str, report: Callable[[str], None], /, *, open_to_network: bool = False
) -> MemoryAgent:
    raise AgentUnavailable("NIXL is not installed")


def supervisor(simulation: Simulation, world: World, connector: Connector) -> Supervisor:
    """Of a worker without a gateway."""
    shape = EngineShape()

    async def live(address: str) -> None:
        engine = shape.build()
        executor = executor_of(engine)
        memory = executor.memory()
        simulation.memories["pool"] = SharedBytes(memory)
        pool = PoolInfo("pool", memory.nbytes, executor.block_bytes, shape.block_size)
        await serve(world, address, engine, shape.info(engine), pool)

    options = WorkerOptions(worker_id="w", data_address="w:2", connector=connector)
    return Supervisor(world, options, TaskLauncher(live), "w:1")


async def until_it_serves(supervisor: Supervisor, running: asyncio.Task[None]) -> None:
    while not supervisor.serves:
        assert not running.done()
        await asyncio.sleep(0.01)


def test_nixl_that_is_asked_for_and_cannot_be_had_keeps_the_worker_from_starting() -> None:
    async def main(simulation: Simulation) -> None:
        world = replace(simulation.world("w"), open_agent=refuse)
        with pytest.raises(CannotStartError, match="--connector nixl cannot be had: NIXL is not installed"):
            await supervisor(simulation, world, "nixl").run()

    run(main, max_virtual_s=100.0)


def test_where_nixl_is_only_preferred_the_worker_serves_without() -> None:
    async def main(simulation: Simulation) -> None:
        world = replace(simulation.world("w"), open_agent=refuse)
        worker = supervisor(simulation, world, "auto")
        running = asyncio.create_task(worker.run())
        await until_it_serves(worker, running)
        assert worker.life is not None
        assert worker.life.agent is None
        running.cancel()

    run(main, max_virtual_s=100.0)


@pytest.mark.parametrize(("connector", "opened"), [("tcp", 0), ("auto", 1), ("nixl", 1)])
def test_an_agent_is_opened_where_it_may_be_used_and_ends_with_the_engine(
    connector: Connector, opened: int
) -> None:
    async def main(simulation: Simulation) -> None:
        agents: list[MemoryAgent] = []
        world = simulation.world("w")

        async def opens(
            path: str,
            size: int,
            address: str,
            report: Callable[[str], None],
            /,
            *,
            open_to_network: bool = False,
        ) -> MemoryAgent:
            assert open_to_network == (connector == "nixl")
            agents.append(await world.open_agent(path, size, address, report))
            return agents[-1]

        worker = supervisor(simulation, replace(world, open_agent=opens), connector)
        running = asyncio.create_task(worker.run())
        await until_it_serves(worker, running)
        assert len(agents) == opened
        assert all(agent.address for agent in agents)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not any(agent.address for agent in agents)

    run(main, max_virtual_s=100.0)


def test_an_agent_that_stands_when_the_worker_has_ended_is_closed() -> None:
    async def main(simulation: Simulation) -> None:
        agents: list[MemoryAgent] = []
        asked, world = asyncio.Event(), simulation.world("w")

        async def opens(
            path: str,
            size: int,
            address: str,
            report: Callable[[str], None],
            /,
            *,
            open_to_network: bool = False,
        ) -> MemoryAgent:
            asked.set()
            await asyncio.sleep(5.0)
            agents.append(await world.open_agent(path, size, address, report))
            return agents[-1]

        running = asyncio.create_task(supervisor(simulation, replace(world, open_agent=opens), "auto").run())
        await asked.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.sleep(10.0)
        assert len(agents) == 1
        assert not any(agent.address for agent in agents)

    run(main, max_virtual_s=100.0)
