"""The target's side: one pull, from a ticket to blocks that may be used.

In: a ticket, and the reserved blocks. Out: the blocks filled and confirmed, or `TransferFailed`. When `fetch`
has ended, in whatever way, nothing writes into the blocks any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.handoff import Cause, Reserved, Ticket
from headrace.transfer.messages import (
    MAX_FRAME_BYTES,
    Checksums,
    Chunk,
    Confirm,
    Confirmed,
    Denied,
    FromSource,
    Want,
)
from headrace.transfer.pool import Pool
from headrace.world import ConnectFailed, Connection, ConnectionLost, World

CONNECT_TIMEOUT_S = 5.0

STALL_TIMEOUT_S = 10.0
"""How long an answer that needs no computation may take to come; a chunk has time for its bytes as well."""

SLOWEST_BYTES_PER_S = 10e6
"""What comes more slowly than this is given up: computing it is quicker."""


class Patience:
    """How long a pull waits for the next blocks: without limit, until the source has computed them all.

    A source that has died or cannot be reached any more may never say so; who knows that it is done says it.
    """

    def __init__(self) -> None:
        self._done = False
        self._limit: asyncio.Timeout | None = None

    def source_is_done(self) -> None:
        """All blocks are computed: from now on each wait is bounded by `STALL_TIMEOUT_S`."""
        self._done = True
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + STALL_TIMEOUT_S)

    async def next(self, channel: Channel[FromSource]) -> FromSource | None:
        """The source's next word. Raises TimeoutError."""
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S if self._done else None) as self._limit:
                return await channel.receive()
        finally:
            self._limit = None


class TransferFailed(Exception):
    """The blocks did not come, or may not be used. The text says why."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a pull moved and how long it took. Times in seconds."""

    blocks: int
    bytes_moved: int
    wait_s: float
    """Until the first block began to come."""
    move_s: float
    """From there to the confirmation."""


async def fetch(
    world: World, pool: Pool, reserved: Reserved, ticket: Ticket, patience: Patience | None = None
) -> Fetched:
    """Fill the reserved blocks from the ticket's source, and have it confirm that they may be used.

    Waits without limit for blocks that are not computed yet; whoever calls ends that through `patience`.
    Raises TransferFailed. Cancelled, it ends when the transport is quiet.
    """
    _check(pool, reserved, ticket)
    began = world.now()
    try:
        connection = await world.network.connect(ticket.address, timeout_s=CONNECT_TIMEOUT_S, plain=True)
    except ConnectFailed as error:
        raise TransferFailed(Cause.UNREACHABLE, f"the source cannot be reached ({error.reason})") from error
    except ValueError as error:  # what a ticket says comes from elsewhere
        raise TransferFailed(Cause.UNREACHABLE, f"the source cannot be reached ({error})") from error
    try:
        return await _pull(world, pool, reserved, ticket, connection, began, patience or Patience())
    except ConnectionLost as loss:
        raise TransferFailed(Cause.LOST, f"the connection to the source was lost ({loss.reason})") from loss
    except asyncio.IncompleteReadError as error:
        raise TransferFailed(Cause.LOST, "the source ended the connection within a block") from error
    except ProtocolError as error:
        raise TransferFailed(Cause.CORRUPT, f"the source sent what is no answer ({error.reason})") from error
    except TimeoutError as error:
        raise TransferFailed(Cause.STALLED, "the source sent nothing, or too slowly") from error
    finally:
        connection.abort()  # all that had to be said was said


def _check(pool: Pool, reserved: Reserved, ticket: Ticket) -> None:
    """The source's blocks must be what this worker would have computed itself, position for position."""
    if ticket.kv_layout != pool.layout:
        raise TransferFailed(
            Cause.MISMATCH, f"the source's blocks are {ticket.kv_layout}, and ours {pool.layout}"
        )
    if ticket.prompt_tokens != reserved.prompt_tokens or ticket.identities != reserved.identities:
        raise TransferFailed(Cause.MISMATCH, "the source computes another prompt, model, precision or tenant")


async def _pull(
    world: World,
    pool: Pool,
    reserved: Reserved,
    ticket: Ticket,
    connection: Connection,
    began: float,
    patience: Patience,
) -> Fetched:
    channel: Channel[FromSource] = Channel(connection, FromSource, max_frame_bytes=MAX_FRAME_BYTES)
    places = [block for span in reserved.fill for block in span.blocks]
    names = [(span.group, span.first, len(span.blocks)) for span in reserved.fill]
    channel.post(Want(ticket.token, ticket.generation, names))
    first_s: float | None = None
    filled = 0
    while filled < len(places):
        chunk = await patience.next(channel)
        if not isinstance(chunk, Chunk) or not 0 < chunk.count <= len(places) - filled:
            raise _refusal(chunk)
        first_s = world.now() if first_s is None else first_s
        async with asyncio.timeout(STALL_TIMEOUT_S + chunk.count * pool.block_bytes / SLOWEST_BYTES_PER_S):
            arrived = await connection.read_into(pool.views(places[filled : filled + chunk.count]))
            sent = await channel.receive()
        if not isinstance(sent, Checksums):
            raise _refusal(sent)
        if sent.values != arrived:
            raise TransferFailed(Cause.CORRUPT, "bytes were changed on the way: checksums differ")
        filled += chunk.count
    channel.post(Confirm())
    async with asyncio.timeout(STALL_TIMEOUT_S):
        confirmed = await channel.receive()
    if not isinstance(confirmed, Confirmed):
        raise _refusal(confirmed)
    now = world.now()
    first_s = now if first_s is None else first_s
    return Fetched(len(places), len(places) * pool.block_bytes, first_s - began, now - first_s)


def _refusal(answer: FromSource | None) -> TransferFailed:
    if isinstance(answer, Denied):
        return TransferFailed(Cause.DENIED, answer.reason)
    if answer is None:
        return TransferFailed(Cause.LOST, "the source ended the connection")
    return TransferFailed(Cause.CORRUPT, f"the source sent {type(answer).__name__} out of turn")
