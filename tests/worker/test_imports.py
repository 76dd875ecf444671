"""Imports whose pull ends in ways that nobody foresaw: each is settled, and the request goes on."""

from __future__ import annotations

import asyncio

import pytest

from headrace.protocol.engine_messages import Continue, Release
from headrace.protocol.handoff import BlockSpan, Cause, Reserved, Ticket
from headrace.protocol.messages import ImportSettled
from headrace.sim import Simulation, run
from headrace.transfer import Pool
from headrace.worker.imports import Imports

IDENTITIES = [b"0"]


def settle(
    address: str, generated: list[int] | None = None
) -> tuple[list[ImportSettled], list[Continue | Release], list[str]]:
    """What is said of one import whose ticket names this address: to the gateway, the engine, and people."""
    told: list[ImportSettled] = []
    orders: list[Continue | Release] = []
    lines: list[str] = []

    async def main(simulation: Simulation) -> None:
        pool = Pool(memoryview(bytearray(100)), 100, 16, "layout")
        imports = Imports(
            simulation.world("target"),
            pool,
            to_engine=orders.append,
            settled=told.append,
            report=lines.append,
        )
        imports.reserved(Reserved("r", 16, 0, [BlockSpan(0, 0, [0])], IDENTITIES))
        imports.fetch(
            "r",
            Ticket(
                token=b"t",
                address=address,
                worker_id="source",
                generation=1,
                kv_layout="layout",
                prompt_tokens=16,
                identities=IDENTITIES,
            ),
        )
        imports.begin("r", [5] if generated is None else generated)
        await asyncio.sleep(1.0)
        await imports.close()

    run(main, max_virtual_s=100.0)
    return told, orders, lines


def test_a_pull_that_is_given_up_before_it_began_settles_the_import() -> None:
    (settled,), orders, _ = settle("source:1", generated=[])
    assert settled.cause is Cause.ABANDONED
    assert orders == [Continue("r", False, [])]


def test_a_ticket_without_an_address_is_a_source_that_cannot_be_reached() -> None:
    (settled,), orders, _ = settle("no address")
    assert settled.cause is Cause.UNREACHABLE
    assert "no address" in settled.reason
    assert orders == [Continue("r", False, [5])]


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), MemoryError()])
def test_whatever_a_pull_raises_settles_the_import(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("headrace.worker.imports.fetch", fail)
    (settled,), orders, (line,) = settle("source:1")
    assert not settled.imported
    assert settled.cause is Cause.LOST
    assert type(error).__name__ in settled.reason
    assert line.startswith("KV blocks from source at source:1")
    assert orders == [Continue("r", False, [5])]
