"""Real workers that read each other's KV blocks with NIXL, and what is killed or stopped while they do."""

from __future__ import annotations

import asyncio
import importlib.util
import signal

import pytest
from fault_house import FaultHouse, in_fault_house
from test_fault_signals import REQUESTS, under_load

from headrace.world.nixl_messages import PACKAGES

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in PACKAGES),
    reason="NIXL is not installed (pip install 'headrace[nixl]')",
)


@pytest.fixture(params=["memory", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What NIXL moves bytes over: from process to process, or over TCP as between machines."""
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return str(request.param)


def test_blocks_are_read(transport: str) -> None:
    async def body(house: FaultHouse) -> None:
        await house.serve_all(house.requests(REQUESTS, seed=1), 12)
        assert house.tally.failed_transfers == 0, house.lines
        assert house.tally.read_blocks > 0, house.lines
        assert any("KV blocks from prefill-1 come over NIXL" in line for line in house.lines), house.lines
        await house.wait_nothing_held()

    in_fault_house(body, "nixl")


@pytest.mark.parametrize("process", ["engine", "supervisor", "agent"])
@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_process_that_is_killed_while_blocks_are_read(name: str, process: str) -> None:
    async def body(house: FaultHouse) -> None:
        generation = house.member(name).info.generation
        await under_load(house, name, process, signal.SIGKILL)
        if process != "agent":
            await house.until(
                lambda: house.member(name).is_live and house.member(name).info.generation != generation,
                "another life of the worker",
            )
        else:
            assert house.member(name).info.generation == generation
            await house.until(
                lambda: any("the NIXL agent was lost" in line for line in house.lines), "it is told"
            )
        read = house.tally.read_blocks

        async def again() -> None:
            number = 90
            while house.tally.read_blocks == read:
                number += 1
                await house.serve_all(house.requests(6, seed=number), 6)

        async with asyncio.timeout(30):
            await again()
        await house.wait_nothing_held()

    in_fault_house(body, "nixl")


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_an_agent_that_stands_still(name: str) -> None:
    """Its reads are given up and the blocks come another way, or are computed at home."""

    async def body(house: FaultHouse) -> None:
        agent = house.agent(name)
        await under_load(house, name, "agent", signal.SIGSTOP)
        if agent.is_running():
            agent.send_signal(signal.SIGCONT)
        await house.wait_nothing_held()

    in_fault_house(body, "nixl")
