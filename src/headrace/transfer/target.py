"""The target's side: one pull, from a ticket to blocks that may be used.

In: a ticket, and the reserved blocks. Out: the blocks filled and confirmed, or `TransferFailed`. When `fetch`
has ended, in whatever way, nothing writes into the blocks any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.handoff import Cause, Reserved, Ticket
from headrace.transfer.connector import Connector
from headrace.transfer.messages import (
    MAX_FRAME_BYTES,
    BlockNames,
    Checksums,
    Chunk,
    Confirm,
    Confirmed,
    Denied,
    FromSource,
    Shown,
    Taken,
    Want,
    sum_of_places,
)
from headrace.transfer.pool import Pool
from headrace.transfer.times import STALL_TIMEOUT_S, chunk_time_s
from headrace.world import ConnectFailed, Connection, ConnectionLost, MemoryAgent, ReadFailed, World

CONNECT_TIMEOUT_S = 5.0


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
    read: int = 0
    """How many of the blocks were read from the source's memory; the others came as bytes."""


async def fetch(
    world: World,
    pool: Pool,
    reserved: Reserved,
    ticket: Ticket,
    patience: Patience | None = None,
    connector: Connector | None = None,
) -> Fetched:
    """Fill the reserved blocks from the ticket's source, and have it confirm that they may be used.

    Waits without limit for blocks that are not computed yet; whoever calls ends that through `patience`.
    Without `connector`, or where that says so, blocks come as bytes. Raises TransferFailed. Cancelled, it
    ends when the transport is quiet.
    """
    _check(pool, reserved, ticket)
    began = world.now()
    try:
        connection = await world.network.connect(ticket.address, timeout_s=CONNECT_TIMEOUT_S, plain=True)
    except ConnectFailed as error:
        raise TransferFailed(Cause.UNREACHABLE, f"the source cannot be reached ({error.reason})") from error
    except ValueError as error:  # what a ticket says comes from elsewhere
        raise TransferFailed(Cause.UNREACHABLE, f"the source cannot be reached ({error})") from error
    pull = _Pull(world, pool, reserved, ticket, connection, patience or Patience())
    try:
        return await pull.run(began, connector or Connector())
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


class _Pull:
    """One pull over its connection."""

    def __init__(
        self,
        world: World,
        pool: Pool,
        reserved: Reserved,
        ticket: Ticket,
        connection: Connection,
        patience: Patience,
    ) -> None:
        self._world = world
        self._pool = pool
        self._ticket = ticket
        self._connection = connection
        self._channel: Channel[FromSource] = Channel(connection, FromSource, max_frame_bytes=MAX_FRAME_BYTES)
        self._patience = patience
        self._places = [block for span in reserved.fill for block in span.blocks]
        self._names = [
            (span.group, span.first + i) for span in reserved.fill for i in range(len(span.blocks))
        ]
        self._filled = 0
        self._heard: deque[FromSource] = deque()
        """What the source said while something was read."""
        self._first_s: float | None = None

    async def run(self, began: float, connector: Connector) -> Fetched:
        """Raises TransferFailed, and what the connection raises."""
        agent = connector.reads(self._ticket)
        if agent is not None:
            await self._read(agent, connector)
        read = self._filled
        if self._filled < len(self._places) or agent is None:
            await self._receive()
        self._channel.post(Confirm())
        async with asyncio.timeout(STALL_TIMEOUT_S):
            confirmed = await self._channel.receive()
        if not isinstance(confirmed, Confirmed):
            raise _refusal(confirmed)
        if read == len(self._places) > 0:
            connector.was_read(self._ticket)
        now, blocks = self._world.now(), len(self._places)
        first_s = now if self._first_s is None else self._first_s
        return Fetched(blocks, blocks * self._pool.block_bytes, first_s - began, now - first_s, read)

    def _want(self, *, reads: bool = False, checked: bool = False) -> None:
        """Ask for what is not there yet."""
        ticket, names = self._ticket, _spans(self._names[self._filled :])
        self._channel.post(Want(ticket.token, ticket.generation, names, reads, checked))

    async def _next(self) -> FromSource | None:
        word = self._heard.popleft() if self._heard else await self._patience.next(self._channel)
        if self._first_s is None:
            self._first_s = self._world.now()
        return word

    # ---- as bytes ------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        """Have all that is not there yet sent."""
        self._want()
        while (left := len(self._places) - self._filled) > 0:
            chunk = await self._next()
            if not isinstance(chunk, Chunk) or not 0 < chunk.count <= left:
                raise _refusal(chunk)
            places = self._places[self._filled : self._filled + chunk.count]
            async with asyncio.timeout(chunk_time_s(chunk.count * self._pool.block_bytes)):
                arrived = await self._connection.read_into(self._pool.views(places))
                sent = await self._channel.receive()
            if not isinstance(sent, Checksums):
                raise _refusal(sent)
            _compare(sent.values, arrived)
            self._filled += chunk.count

    # ---- by reading ----------------------------------------------------------------------------------

    async def _read(self, agent: MemoryAgent, connector: Connector) -> None:
        """Read all blocks, or as many as can be."""
        self._want(reads=True, checked=connector.checked)
        try:
            while (left := len(self._places) - self._filled) > 0:
                shown = await self._next()
                if not isinstance(shown, Shown) or not 0 < len(shown.places) <= left:
                    raise _refusal(shown)
                if min(shown.places) < 0 or shown.places_sum != sum_of_places(shown.places):
                    raise TransferFailed(Cause.CORRUPT, "what the source said was changed on the way")
                await self._read_shown(agent, shown, checked=connector.checked)
                self._filled += len(shown.places)
                self._channel.post(Taken(len(shown.places)))
        except ReadFailed as failure:
            connector.failed(self._ticket, f"its memory cannot be read ({failure})")

    async def _read_shown(self, agent: MemoryAgent, shown: Shown, *, checked: bool) -> None:
        """Raises ReadFailed, TransferFailed, ConnectionLost."""
        size, count = self._pool.block_bytes, len(shown.places)
        ours = [place * size for place in self._places[self._filled : self._filled + count]]
        theirs = [place * size for place in shown.places]
        limit_s = chunk_time_s(count * size)
        try:
            async with asyncio.timeout(limit_s):
                await self._listening(agent.read(self._ticket.memory, ours, theirs, size))
        except TimeoutError:
            raise ReadFailed(f"{count * size} bytes took longer than {limit_s:.0f} s") from None
        if checked:
            if not shown.checksums:
                raise ReadFailed("its agent was lost")
            _compare(shown.checksums, await agent.checksums(ours, size))

    async def _listening(self, reading: Coroutine[Any, Any, None]) -> None:
        """Read, and stop when the source ends the pull meanwhile. Ends when the reading is over."""
        task = asyncio.create_task(reading, name="transfer.read")
        hearing = asyncio.create_task(self._channel.receive(), name="transfer.source")
        try:
            while not task.done():
                await asyncio.wait({task, hearing}, return_when=asyncio.FIRST_COMPLETED)
                if hearing.done():
                    if not isinstance(word := hearing.result(), Shown):
                        raise _refusal(word)
                    self._heard.append(word)
                    hearing = asyncio.create_task(self._channel.receive(), name="transfer.source")
        finally:
            task.cancel()
            hearing.cancel()
            await _over(task)
            await asyncio.gather(hearing, return_exceptions=True)
        task.result()


async def _over(task: asyncio.Task[None]) -> None:
    """Wait for `task` to be over, and let a cancellation wait as well."""
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation


def _spans(names: list[tuple[int, int]]) -> BlockNames:
    """Names as (KV group, first, count), in their order."""
    spans: BlockNames = []
    for group, number in names:
        if spans and spans[-1][0] == group and sum(spans[-1][1:]) == number:
            spans[-1] = (group, spans[-1][1], spans[-1][2] + 1)
        else:
            spans.append((group, number, 1))
    return spans


def _compare(sent: list[int], arrived: list[int]) -> None:
    if sent != arrived:
        raise TransferFailed(Cause.CORRUPT, "bytes were changed on the way: checksums differ")


def _refusal(answer: FromSource | None) -> TransferFailed:
    if isinstance(answer, Denied):
        return TransferFailed(Cause.DENIED, answer.reason)
    if answer is None:
        return TransferFailed(Cause.LOST, "the source ended the connection")
    return TransferFailed(Cause.CORRUPT, f"the source sent {type(answer).__name__} out of turn")
