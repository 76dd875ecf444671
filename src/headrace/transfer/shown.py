"""The source's side where the target reads by itself: it is told where blocks lie, as they are computed.

In: what the target wanted, and what it says of what it has read. Out: places, checksums where it asked for
them, and its last word. The agent makes progress only from the moment that blocks were shown until the target
says that it has read them.

What the target reads cannot be stopped from here. It may not use what it read after the lease has ended,
since nothing is confirmed any more; the blocks are kept out of use a moment longer all the same, until it
says that its reads are over.
"""

from __future__ import annotations

import asyncio
import contextlib

from headrace.protocol.channel import Channel, ProtocolError
from headrace.transfer.lease import Lease, State
from headrace.transfer.messages import Confirm, Denied, FromTarget, Shown, Taken, Want, sum_of_places
from headrace.transfer.pool import Pool
from headrace.transfer.times import ANSWER_TIMEOUT_S, chunk_time_s
from headrace.world import ConnectionLost, MemoryAgent, ReadFailed

CHUNK_BLOCKS = 1 << 14
"""How many blocks are shown together: places and checksums fit into a frame."""

QUIET_S = 1.0
"""How long a target may take to end its reads when the lease has ended."""


async def show(
    lease: Lease, pool: Pool, agent: MemoryAgent, channel: Channel[FromTarget], want: Want
) -> FromTarget | None:
    """Show the wanted blocks to the last; returns what the target says then, None if it has left.

    That is a `Want` when it cannot read. Raises TimeoutError, ProtocolError, ConnectionLost. Cancelled, it
    waits for the target's reads to end.
    """
    names = want.names()
    shown = taken = 0
    hearing = asyncio.create_task(channel.receive(), name="transfer.target")
    try:
        with contextlib.ExitStack() as serving:
            while True:
                places = lease.ready(names[shown:], CHUNK_BLOCKS)
                if places:
                    checksums = await _checksums(pool, agent, places) if want.checked else []
                    if shown == taken:
                        serving.enter_context(agent.serving())
                    channel.post(Shown(places, sum_of_places(places), checksums))
                    shown += len(places)
                    continue
                if shown < len(names) and lease.state is State.HELD:
                    channel.post(Denied(f"block {names[shown]} is no part of this export"))
                    return None
                changed = lease.changed
                if not hearing.done():
                    await _wait(hearing, changed, _limit_s(lease, pool, shown - taken, shown == len(names)))
                if not hearing.done():
                    continue
                word = hearing.result()
                if isinstance(word, Confirm) and taken == len(names) and lease.state is not State.HELD:
                    await changed.wait()  # the step that ends the prompt has not
                    continue
                if not isinstance(word, Taken) or not 0 < word.count <= shown - taken:
                    return word
                taken += word.count
                if taken == shown:
                    serving.close()
                hearing = asyncio.create_task(channel.receive(), name="transfer.target")
    except asyncio.CancelledError:
        if lease.state is State.QUARANTINED and taken < shown:
            await _until_quiet(channel, hearing)
        raise
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


async def _checksums(pool: Pool, agent: MemoryAgent, places: list[int]) -> list[int]:
    """None where they cannot be had, and then nobody reads."""
    try:
        return await agent.checksums([place * pool.block_bytes for place in places], pool.block_bytes)
    except ReadFailed:
        return []


def _limit_s(lease: Lease, pool: Pool, reading: int, all_shown: bool) -> float | None:
    """How long the target may say nothing."""
    if reading:
        return chunk_time_s(reading * pool.block_bytes)
    return ANSWER_TIMEOUT_S if all_shown and lease.state is State.HELD else None


async def _wait(
    hearing: asyncio.Task[FromTarget | None], changed: asyncio.Event, limit_s: float | None
) -> None:
    """Wait for a word, or for more blocks. Raises TimeoutError where the target is the one to speak."""
    more = asyncio.create_task(changed.wait(), name="transfer.more")
    try:
        done, _ = await asyncio.wait({hearing, more}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        more.cancel()
    if not done:
        raise TimeoutError


async def _until_quiet(channel: Channel[FromTarget], hearing: asyncio.Task[FromTarget | None]) -> None:
    """Tell the target to stop, and wait until it has left; whatever it still says is not answered."""
    with contextlib.suppress(ConnectionLost, ProtocolError, TimeoutError):
        channel.post(Denied("the lease has ended"))
        async with asyncio.timeout(QUIET_S):
            while await hearing is not None:
                hearing = asyncio.create_task(channel.receive(), name="transfer.target")
