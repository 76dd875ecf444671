"""Real signals to each kind of process of a worker under load: no token changes, nothing is left behind."""

from __future__ import annotations

import asyncio
import signal

import pytest
from fault_house import LAPSE_S, FaultHouse, in_fault_house

REQUESTS = 48
AT_ONCE = 12


async def under_load(house: FaultHouse, name: str, process: str, number: signal.Signals) -> None:
    """Send the signal when the load is at its height, and see that all of it comes out right."""
    serving = asyncio.create_task(house.serve_all(house.requests(REQUESTS, seed=number), AT_ONCE))
    try:
        await house.until(lambda: house.done >= AT_ONCE or serving.done(), "the height of the load")
        await house.until(lambda: bool(house.member(name).legs) or serving.done(), f"work at {name}")
        assert not serving.done(), "the load was over too soon"
        target = {"engine": house.engine, "supervisor": house.supervisor, "agent": house.agent}[process](name)
        target.send_signal(number)
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert house.done == REQUESTS


@pytest.mark.parametrize("process", ["engine", "supervisor"])
@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_killed_process_is_replaced_and_its_requests_go_on(name: str, process: str) -> None:
    async def body(house: FaultHouse) -> None:
        generation = house.member(name).info.generation
        await under_load(house, name, process, signal.SIGKILL)
        if name == "decode-1":
            assert house.tally.replays > 0
        if process == "engine":  # and not only that its connection ended
            assert f"{name} is gone: its engine was lost with SIGKILL" in house.lines
        assert house.tally.transfers > 0
        await house.until(
            lambda: house.member(name).is_live and house.member(name).info.generation != generation,
            "another life of the worker",
        )
        await house.serve_all(house.requests(6, seed=99), 6)
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_an_engine_that_is_terminated_is_replaced(name: str) -> None:
    async def body(house: FaultHouse) -> None:
        await under_load(house, name, "engine", signal.SIGTERM)
        await house.until(
            lambda: any("lost with SIGTERM" in line for line in house.lines), "the loss is told"
        )
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_an_engine_that_stands_still_is_a_stuck_step(name: str) -> None:
    async def body(house: FaultHouse) -> None:
        stopped = house.engine(name)
        await under_load(house, name, "engine", signal.SIGSTOP)
        await house.until(
            lambda: any("lost with a step that did not end within" in line for line in house.lines),
            "given up",
        )
        await house.until(lambda: not stopped.is_running(), "its process is ended", 3)
        await house.until(lambda: house.member(name).is_live, "another engine")
        if name == "decode-1":
            assert house.tally.replays > 0
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_silent_supervisor_is_given_up_and_comes_back(name: str) -> None:
    async def body(house: FaultHouse) -> None:
        supervisor, generation = house.supervisor(name), house.member(name).info.generation

        async def wake_when_given_up() -> None:
            await house.until(lambda: not house.member(name).is_live, "it is given up")
            assert "silent" in house.member(name).why_down
            supervisor.send_signal(signal.SIGCONT)

        waking = asyncio.create_task(wake_when_given_up())
        await under_load(house, name, "supervisor", signal.SIGSTOP)
        await waking
        await house.until(lambda: house.member(name).is_live, "it is back")
        assert house.member(name).info.generation == generation  # the same life of the engine
        await house.serve_all(house.requests(6, seed=99), 6)
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_supervisor_that_stands_still_for_good_is_replaced(name: str) -> None:
    async def body(house: FaultHouse) -> None:
        supervisor, generation = house.supervisor(name), house.member(name).info.generation
        await under_load(house, name, "supervisor", signal.SIGSTOP)
        await house.until(
            lambda: house.member(name).is_live and house.member(name).info.generation != generation,
            "another worker of its name",
        )
        assert not supervisor.is_running()
        assert f"{name} was lost with a process that stood still for 4 s; starting it again in 0.1 s" in (
            house.lines
        )
        await house.serve_all(house.requests(6, seed=99), 6)
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("process", ["engine", "supervisor"])
def test_a_short_stillness_costs_nothing(process: str) -> None:
    async def body(house: FaultHouse) -> None:
        target = house.engine("decode-1") if process == "engine" else house.supervisor("decode-1")
        asyncio.get_running_loop().call_later(LAPSE_S / 2 + 0.5, target.send_signal, signal.SIGCONT)
        serving = asyncio.create_task(house.serve_all(house.requests(REQUESTS, seed=3), AT_ONCE))
        await house.until(lambda: bool(house.member("decode-1").legs), "work at decode-1")
        target.send_signal(signal.SIGSTOP)
        await serving
        assert house.tally.replays == 0
        assert house.member("decode-1").is_live
        await house.wait_nothing_held()

    in_fault_house(body)


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_terminated_worker_drains(name: str) -> None:
    async def body(house: FaultHouse) -> None:
        supervisor = house.supervisor(name)
        await under_load(house, name, "supervisor", signal.SIGTERM)
        await house.until(lambda: not supervisor.is_running(), "its process has ended")
        assert not house.member(name).is_live
        assert house.tally.replays == 0
        assert house.tally.failed_transfers == 0
        await house.serve_all(house.requests(6, seed=99), 6)  # without it
        await house.wait_nothing_held()

    in_fault_house(body)
