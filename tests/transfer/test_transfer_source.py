"""Whoever dials in at a source of blocks: what a stranger can make it keep, and what a token lets one ask."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from headrace.protocol.channel import Channel
from headrace.protocol.handoff import BlockSpan, Computed, Exporting
from headrace.sim import Simulation, run
from headrace.transfer import Exports, Pool
from headrace.transfer.messages import MAX_FRAME_BYTES, Chunk, Denied, FromSource, Want
from headrace.transfer.source import MAX_STRANGERS
from headrace.transfer.times import ANSWER_TIMEOUT_S
from headrace.world import Connection, ConnectionLost

BLOCKS = 4
Dial = Callable[[], Awaitable[Connection]]


def visit(visitor: Callable[[Dial, bytes], Awaitable[None]]) -> None:
    """Let somebody dial in at a source that holds one export of four blocks; it gets the export's token."""

    async def main(simulation: Simulation) -> None:
        pool = Pool(memoryview(bytearray(10 * 32)), 32, 4, "layout")
        world = simulation.world("p")
        exports = Exports(
            world, pool, worker_id="p", generation=1, address="p:1", released=lambda name, how: None
        )
        listener = await world.network.listen("p:1", exports.serve, plain=True)
        ticket = exports.offer(Exporting("r", 4 * BLOCKS, []))
        exports.computed(Computed("r", 4 * BLOCKS, [BlockSpan(0, 0, list(range(BLOCKS)))]))
        exports.held("r")

        async def dial() -> Connection:
            return await simulation.world("x").network.connect("p:1", timeout_s=1.0, plain=True)

        await visitor(dial, ticket.token)
        await listener.close()
        await exports.close()

    run(main, max_virtual_s=100.0)


async def answer(connection: Connection) -> FromSource | None:
    channel: Channel[FromSource] = Channel(connection, receives=FromSource)
    return await channel.receive()


def test_a_long_frame_is_refused_by_its_length() -> None:
    async def visitor(dial: Dial, token: bytes) -> None:
        connection = await dial()
        connection.write((MAX_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(1000))
        with pytest.raises(ConnectionLost):
            await connection.read(1)

    assert MAX_FRAME_BYTES <= 1 << 20
    visit(visitor)


@pytest.mark.parametrize(
    "names",
    [
        [(0, 0, 10**12)],
        [(0, 1, BLOCKS)],
        [(0, -1, 1)],
        [(0, 3, -3)],
        [(0, 0, BLOCKS)] * 3,  # more than the pool has
    ],
)
def test_what_an_export_cannot_have_is_denied_at_once(names: list[tuple[int, int, int]]) -> None:
    async def visitor(dial: Dial, token: bytes) -> None:
        connection = await dial()
        Channel(connection, receives=FromSource).post(Want(token, 1, names))
        denied = await answer(connection)
        assert isinstance(denied, Denied)
        assert "more blocks" in denied.reason

    visit(visitor)


def test_strangers_are_bounded_and_who_has_a_token_is_served_beside_them() -> None:
    async def visitor(dial: Dial, token: bytes) -> None:
        silent = [await dial() for _ in range(MAX_STRANGERS)]
        last = await dial()
        with pytest.raises(ConnectionLost):
            await silent[0].read(1)
        Channel(last, receives=FromSource).post(Want(token, 1, [(0, 0, BLOCKS)]))
        assert await answer(last) == Chunk(BLOCKS)
        Channel(silent[1], receives=FromSource).post(Want(b"none", 1, []))  # and the others still may speak
        assert isinstance(await answer(silent[1]), Denied)
        last.abort()

    assert ANSWER_TIMEOUT_S > 1.0  # so that it was not for their silence
    visit(visitor)
