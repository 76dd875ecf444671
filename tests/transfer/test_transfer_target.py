"""One pull from a source that a test plays: how long a chunk may take, and bytes that changed on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headrace.protocol.channel import Channel
from headrace.protocol.handoff import BlockSpan, Cause, Reserved, Ticket
from headrace.sim import Simulation, run
from headrace.transfer import Fetched, Pool, TransferFailed, fetch
from headrace.transfer.messages import Checksums, Chunk, Confirm, Confirmed, FromTarget, Want
from headrace.transfer.times import STALL_TIMEOUT_S
from headrace.world import Connection

BLOCK_BYTES = 1000
BLOCKS = 4
SLOWEST_BYTES_PER_S = 100.0
"""So a block has ten seconds for its bytes."""

Source = Callable[[Channel[FromTarget], Connection], Awaitable[None]]


def pull(source: Source, monkeypatch: pytest.MonkeyPatch) -> tuple[Fetched | TransferFailed, float]:
    """What a pull of four blocks came to, and how many seconds it took."""
    monkeypatch.setattr("headrace.transfer.times.SLOWEST_BYTES_PER_S", SLOWEST_BYTES_PER_S)

    async def serve(connection: Connection) -> None:
        channel: Channel[FromTarget] = Channel(connection, receives=FromTarget)
        assert isinstance(await channel.receive(), Want)
        await source(channel, connection)

    async def main(simulation: Simulation) -> tuple[Fetched | TransferFailed, float]:
        listener = await simulation.world("source").network.listen("source:7200", serve, plain=True)
        memory = memoryview(bytearray(BLOCKS * BLOCK_BYTES))
        pool = Pool(memory, BLOCK_BYTES, 16, "layout")
        identities = [bytes([number]) for number in range(BLOCKS)]
        reserved = Reserved("r", 16 * BLOCKS, 0, [BlockSpan(0, 0, list(range(BLOCKS)))], identities)
        ticket = Ticket(
            token=b"t",
            address=listener.address,
            worker_id="source",
            generation=1,
            kv_layout="layout",
            prompt_tokens=16 * BLOCKS,
            identities=identities,
        )
        began_s = simulation.loop.time()
        try:
            fetched = await fetch(simulation.world("target"), pool, reserved, ticket)
        except TransferFailed as failure:
            return failure, simulation.loop.time() - began_s
        assert bytes(memory) == b"".join(map(block, range(BLOCKS)))
        return fetched, simulation.loop.time() - began_s

    return run(main, max_virtual_s=1000.0).result


def block(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK_BYTES


async def send(connection: Connection, numbers: range, pause_s: float) -> list[int]:
    """Send blocks, and pause before the last of them."""
    checksums = await connection.write_from([memoryview(block(number)) for number in numbers[:-1]])
    await asyncio.sleep(pause_s)
    return checksums + await connection.write_from([memoryview(block(numbers[-1]))])


@pytest.mark.parametrize(
    ("chunks", "pause_s", "whole"),
    [
        ([4], 48.0, True),  # four blocks together have 50 s
        ([4], 52.0, False),
        ([1, 3], 38.0, True),  # the three others have 40 s
        ([1, 3], 42.0, False),
    ],
)
def test_a_chunk_has_time_by_its_size(
    chunks: list[int], pause_s: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def source(channel: Channel[FromTarget], connection: Connection) -> None:
        sent = 0
        for count in chunks:
            channel.post(Chunk(count))
            last = sent + count == BLOCKS
            channel.post(Checksums(await send(connection, range(sent, sent + count), pause_s if last else 0)))
            sent += count
        assert isinstance(await channel.receive(), Confirm)
        channel.post(Confirmed())

    result, took_s = pull(source, monkeypatch)
    if whole:
        assert isinstance(result, Fetched)
        assert result.blocks == BLOCKS
        assert pause_s < took_s < pause_s + 0.1
    else:
        assert isinstance(result, TransferFailed)
        assert result.cause is Cause.STALLED
        limit_s = STALL_TIMEOUT_S + chunks[-1] * BLOCK_BYTES / SLOWEST_BYTES_PER_S
        assert limit_s < took_s < limit_s + 0.1


def test_a_changed_byte_is_found_by_its_blocks_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    async def source(channel: Channel[FromTarget], connection: Connection) -> None:
        channel.post(Chunk(BLOCKS))
        checksums = await send(connection, range(BLOCKS), 0.0)
        channel.post(Checksums([*checksums[:-1], checksums[-1] ^ 1]))
        while await channel.receive() is not None:
            channel.post(Confirmed())  # to whom does not look

    result, _ = pull(source, monkeypatch)
    assert isinstance(result, TransferFailed)
    assert result.cause is Cause.CORRUPT
    assert "checksums differ" in str(result)
