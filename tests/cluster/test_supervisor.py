"""When an engine is started again, and when not: in virtual time, with engines as coroutines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from house import EngineShape, collect, request

from headrace.cluster import EngineLostError, Gateway, GatewayState, StartFailedError, Supervisor
from headrace.cluster.supervisor import LONGEST_PAUSE_S, MAX_RESTARTS, STABLE_AFTER_S, START_TIMEOUT_S
from headrace.sim import Simulation, run
from headrace.worker import report_start_failure, serve
from headrace.world.launcher import Launcher, Process


@dataclass
class SimProcess(Process):
    task: asyncio.Task[None]

    async def wait(self) -> str:
        await asyncio.wait({self.task})
        return "SIGKILL" if self.task.cancelled() else "exit code 0"

    async def kill(self) -> None:
        if not self.task.done():
            self.task.cancel()
        await asyncio.wait({self.task})
        if not self.task.cancelled():
            self.task.exception()  # how it died is of no interest


@dataclass
class SimLauncher(Launcher):
    """Starts `life(simulation, address)` on host "worker"."""

    simulation: Simulation
    life: Callable[[Simulation, str, int], Coroutine[Any, Any, None]]
    started_s: list[float] = field(default_factory=list)
    processes: list[SimProcess] = field(default_factory=list)

    async def launch(self, address: str) -> Process:
        self.started_s.append(self.simulation.loop.time())
        network = self.simulation.network
        network.host("worker")
        task = asyncio.create_task(self.life(self.simulation, address, len(self.started_s)))
        process = SimProcess(task)
        self.processes.append(process)
        return process


async def healthy(simulation: Simulation, address: str, number: int) -> None:
    engine, info = EngineShape(step_s=0.01).build()
    await serve(simulation.world("worker"), address, engine, info)


def supervised(
    life: Callable[[Simulation, str, int], Coroutine[Any, Any, None]],
    body: Callable[[Gateway, SimLauncher, asyncio.Task[None]], Coroutine[Any, Any, None]],
) -> None:
    async def main(simulation: Simulation) -> None:
        world = simulation.world("gateway")
        gateway = Gateway(world)
        await gateway.listen("gateway:7000")
        launcher = SimLauncher(simulation, life)
        supervisor = asyncio.create_task(Supervisor(world, gateway, launcher).run())
        try:
            await body(gateway, launcher, supervisor)
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        assert all(process.task.done() for process in launcher.processes)

    run(main, max_virtual_s=100_000)


def test_an_accident_costs_a_tenth_of_a_second() -> None:
    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        for life in range(5):
            await gateway.wait_ready()
            await asyncio.sleep(STABLE_AFTER_S + 1)
            lost_s = gateway._world.now()
            launcher.simulation.network.break_connections("gateway", "worker")
            await gateway.wait_lost()
            await gateway.wait_ready()
            assert len(launcher.started_s) == life + 2
            assert 0.09 < launcher.started_s[-1] - lost_s < 0.2

    supervised(healthy, body)


def test_quick_losses_are_met_with_longer_pauses_and_at_last_with_the_end() -> None:
    async def dies_young(simulation: Simulation, address: str, number: int) -> None:
        async with asyncio.timeout(0.5):
            await healthy(simulation, address, number)

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        with pytest.raises(EngineLostError, match=f"lost {MAX_RESTARTS + 1} times in a row"):
            await supervisor
        starts = launcher.started_s
        pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
        assert len(pauses) == MAX_RESTARTS
        assert pauses == sorted(pauses)
        assert pauses[-1] < LONGEST_PAUSE_S + 1
        assert sum(pauses) > 10
        await gateway.wait_lost()
        assert gateway.state is GatewayState.DEAD

    supervised(dies_young, body)


def test_an_engine_that_never_served_is_not_tried_again() -> None:
    async def leaves(simulation: Simulation, address: str, number: int) -> None:
        await asyncio.sleep(1)

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        with pytest.raises(EngineLostError, match="did not start"):
            await supervisor
        assert len(launcher.started_s) == 1

    supervised(leaves, body)


def test_an_engine_that_fails_to_start_later_is() -> None:
    async def second_one_leaves(simulation: Simulation, address: str, number: int) -> None:
        if number != 2:
            await healthy(simulation, address, number)

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        await gateway.wait_ready()
        await asyncio.sleep(1)
        launcher.simulation.network.break_connections("gateway", "worker")
        await gateway.wait_lost()
        await gateway.wait_ready()
        assert len(launcher.started_s) == 3
        results = await collect(gateway.submit(request("r")))
        assert len(results["r", 0][0]) == 8

    supervised(second_one_leaves, body)


def test_who_says_that_it_cannot_start_is_believed() -> None:
    async def refuses(simulation: Simulation, address: str, number: int) -> None:
        await report_start_failure(simulation.world("worker"), address, "no weights")

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        with pytest.raises(StartFailedError, match="no weights"):
            await supervisor
        assert len(launcher.started_s) == 1

    supervised(refuses, body)


def test_who_says_nothing_is_killed_in_time() -> None:
    async def loads_for_ever(simulation: Simulation, address: str, number: int) -> None:
        await asyncio.Event().wait()

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        with pytest.raises(EngineLostError, match="no word within"):
            await supervisor
        assert START_TIMEOUT_S <= gateway._world.now() < START_TIMEOUT_S + 1

    supervised(loads_for_ever, body)


def test_a_process_that_lost_its_connection_and_does_not_leave_is_killed() -> None:
    async def lingers(simulation: Simulation, address: str, number: int) -> None:
        await healthy(simulation, address, number)
        if number == 1:
            await asyncio.Event().wait()

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        await gateway.wait_ready()
        launcher.simulation.network.break_connections("gateway", "worker")
        await gateway.wait_lost()
        await gateway.wait_ready()
        assert launcher.processes[0].task.cancelled()

    supervised(lingers, body)


def test_who_is_cancelled_while_killing_kills_to_the_end() -> None:
    async def refuses_and_lingers(simulation: Simulation, address: str, number: int) -> None:
        try:
            await report_start_failure(simulation.world("worker"), address, "no weights")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)  # a kernel takes a moment to end a process

    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        with pytest.raises(StartFailedError):
            await gateway.wait_ready()
        await asyncio.sleep(0.01)  # the supervisor is at it
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        assert launcher.processes[0].task.done()

    supervised(refuses_and_lingers, body)


def test_after_a_drain_nothing_is_started() -> None:
    async def body(gateway: Gateway, launcher: SimLauncher, supervisor: asyncio.Task[None]) -> None:
        await gateway.wait_ready()
        assert await gateway.drain(5.0)
        await supervisor
        assert len(launcher.started_s) == 1

    supervised(healthy, body)
