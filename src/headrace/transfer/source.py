"""The source's side: leases on exported blocks, and whoever reads them.

In: what the engine says of its exports. Out: blocks to whoever has a ticket, and to the engine, exactly once
for each export, that nothing touches its blocks any more. It must not know requests beyond their ids.

State       | enters it by                                        | its blocks
------------|-----------------------------------------------------|-------------------------------------
QUEUED      | `offer`                                             | none yet
RUNNING     | `computed`                                          | those computed may be read
HELD        | `held`; the lease runs from here                    | all may be read
QUARANTINED | `drop`, or the lease has expired, while one reads   | the engine keeps them out of use
RELEASED    | confirmed, or dropped or expired and nobody reads   | the engine's again
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import blake2b

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.handoff import Computed, Exporting, Ticket
from headrace.transfer.lease import Lease, State
from headrace.transfer.messages import (
    MAX_FRAME_BYTES,
    Checksums,
    Chunk,
    Confirm,
    Confirmed,
    Denied,
    FromTarget,
    Want,
)
from headrace.transfer.pool import Pool
from headrace.transfer.shown import show
from headrace.transfer.times import ANSWER_TIMEOUT_S
from headrace.world import Connection, MemoryAgent, World

LEASE_S = 30.0
"""How long computed blocks wait to be fetched, by this machine's clock; far longer than a step."""

CHUNK_BYTES = 128 << 20
"""Blocks are sent together up to this size, or one by one above it."""

CHUNK_BLOCKS = 1 << 16
"""Nor more of them together than this, so that their checksums fit into a frame."""

MAX_STRANGERS = 64
"""How many connections at once may not have shown a token yet. Beyond, the one that had the longest time for
it goes: who has a token shows it at once. Those that have shown one are bounded by the leases."""

_TOKEN_BYTES = 16


class Exports:
    """All exports of one life of an engine, from its beginning to `close`."""

    def __init__(
        self,
        world: World,
        pool: Pool,
        *,
        worker_id: str,
        generation: int,
        address: str,
        released: Callable[[str, str], None],
        lease_s: float = LEASE_S,
        agent: MemoryAgent | None = None,
    ) -> None:
        """Somebody listens at `address`, plain, and hands connections to `serve`.

        `released(request_id, how)` is called once for each export, when nothing touches its blocks.

        With `agent`, which has the pool's memory, targets may read blocks by themselves.
        """
        self._world = world
        self._pool = pool
        self._worker_id = worker_id
        self._generation = generation
        self._released = released
        self._lease_s = lease_s
        self._agent = agent
        self._secret = world.random.stream("transfer tokens").randbytes(32)
        self._numbers = 0
        self._leases: dict[str, Lease] = {}
        self._by_token: dict[bytes, Lease] = {}
        self._address = address
        self._readers: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}
        """Those of the readers that have not shown a token, in the order in which they came."""

    def __len__(self) -> int:
        """Exports that are not released."""
        return len(self._leases)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._leases

    async def close(self) -> None:
        """The engine's life is over: read no more, and say nothing of it."""
        for lease in self._leases.values():
            self._stop_timer(lease)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._leases.clear()
        self._by_token.clear()

    # ---- what the engine says ------------------------------------------------------------------------

    def offer(self, event: Exporting) -> Ticket:
        """An export was accepted: the ticket to fetch it with."""
        self._numbers += 1
        size = self._pool.block_size
        token = blake2b(self._numbers.to_bytes(8, "big"), key=self._secret, digest_size=_TOKEN_BYTES).digest()
        lease = Lease(event.request_id, token, size, -(-event.prompt_tokens // size))
        self._leases[event.request_id] = self._by_token[token] = lease
        return Ticket(
            token=token,
            address=self._address,
            memory=self._agent.address if self._agent is not None else b"",
            worker_id=self._worker_id,
            generation=self._generation,
            kv_layout=self._pool.layout,
            prompt_tokens=event.prompt_tokens,
            identities=event.identities,
        )

    def computed(self, event: Computed) -> None:
        """Further blocks of an export may be read."""
        lease = self._leases.get(event.request_id)
        if lease is None or lease.state not in (State.QUEUED, State.RUNNING):
            return
        self._become(lease, State.RUNNING)
        lease.positions = event.positions
        for span in event.spans:
            for offset, block in enumerate(span.blocks):
                lease.blocks[span.group, span.first + offset] = block
        lease.tell()

    def held(self, request_id: str) -> None:
        """An export is complete: its lease begins."""
        lease = self._leases.get(request_id)
        if lease is not None and lease.state in (State.QUEUED, State.RUNNING):
            self._become(lease, State.HELD)
            loop = asyncio.get_running_loop()
            lease.expiry = loop.call_later(self._lease_s, self._end, lease, "expired")
            lease.tell()

    def drop(self, request_id: str) -> None:
        """An export has ended in another way than by being fetched."""
        if (lease := self._leases.get(request_id)) is not None:
            self._end(lease, "dropped")

    # ---- the end of a lease --------------------------------------------------------------------------

    def _end(self, lease: Lease, how: str) -> None:
        """Nobody may read any more: release now, or when who reads has let go."""
        if lease.state in (State.QUARANTINED, State.RELEASED):
            return
        lease.how = how
        self._stop_timer(lease)
        if lease.reader is None:
            self._release(lease)
        else:
            self._become(lease, State.QUARANTINED)
            lease.reader.cancel()

    def _release(self, lease: Lease) -> None:
        self._become(lease, State.RELEASED)
        self._stop_timer(lease)
        del self._leases[lease.request_id]
        del self._by_token[lease.token]
        self._released(lease.request_id, lease.how)

    def _become(self, lease: Lease, state: State) -> None:
        if lease.state is not state:
            lease.state = state
            self._world.trace("lease", lease.request_id, state)

    def _stop_timer(self, lease: Lease) -> None:
        if lease.expiry is not None:
            lease.expiry.cancel()
            lease.expiry = None

    # ---- who reads -----------------------------------------------------------------------------------

    async def serve(self, connection: Connection) -> None:
        """Serve one who dialled in, to the end."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("blocks are served outside of a task")
        self._readers.add(task)
        channel: Channel[FromTarget] = Channel(connection, FromTarget, max_frame_bytes=MAX_FRAME_BYTES)
        try:
            want = await self._first_word(task, channel)
            if isinstance(want, Want):
                await self._read(task, connection, channel, want)
        except (ProtocolError, TimeoutError):
            connection.abort()  # the target learns no more than that; it computes what it did not get
        finally:
            self._readers.discard(task)

    async def _first_word(self, task: asyncio.Task[None], channel: Channel[FromTarget]) -> FromTarget | None:
        """Raises as `receive`, and TimeoutError; cancelled when too many others wait to say theirs."""
        if len(self._strangers) >= MAX_STRANGERS:
            longest = next(iter(self._strangers))
            del self._strangers[longest]
            longest.cancel()
        self._strangers[task] = None
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await channel.receive()
        finally:
            self._strangers.pop(task, None)

    async def _read(
        self,
        task: asyncio.Task[None],
        connection: Connection,
        channel: Channel[FromTarget],
        want: Want,
    ) -> None:
        lease = self._by_token.get(want.token)
        if lease is None or want.generation != self._generation:
            channel.post(Denied("the blocks are not held here any more"))
            return
        if not self._may_want(lease, want):
            channel.post(Denied("more blocks are asked for than this export can have"))
            return
        if lease.reader is not None:
            channel.post(Denied("the blocks are being fetched already"))
            return
        lease.reader = task
        try:
            word: FromTarget | None = want
            if want.reads and self._agent is not None:
                word = await show(lease, self._pool, self._agent, channel, want)
            if isinstance(word, Want):
                word = await self._send_wanted(lease, connection, channel, word)
            if isinstance(word, Confirm) and lease.state is State.HELD:
                lease.how = "confirmed"
                channel.post(Confirmed())
        finally:
            lease.reader = None
            if lease.how and lease.state is not State.RELEASED:
                self._release(lease)

    def _may_want(self, lease: Lease, want: Want) -> bool:
        """Whether so many blocks can be: what is asked for is laid out in memory name by name."""
        in_pool = self._pool.memory.nbytes // self._pool.block_bytes
        in_prompt = all(0 <= first <= first + count <= lease.numbers for _, first, count in want.blocks)
        return in_prompt and sum(count for _, _, count in want.blocks) <= in_pool

    async def _send_wanted(
        self, lease: Lease, connection: Connection, channel: Channel[FromTarget], want: Want
    ) -> FromTarget | None:
        """Send what is wanted; returns what the target says then."""
        if want.reads:
            channel.post(Denied("the blocks cannot be read here"))
        elif not self._may_want(lease, want):
            channel.post(Denied("more blocks are asked for than this export can have"))
        elif await self._send(lease, connection, channel, want):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await channel.receive()
        return None

    async def _send(
        self, lease: Lease, connection: Connection, channel: Channel[FromTarget], want: Want
    ) -> bool:
        """Send the wanted blocks as they are computed, to the last; then wait until the export is held."""
        names = want.names()
        most = min(max(1, CHUNK_BYTES // self._pool.block_bytes), CHUNK_BLOCKS)
        sent = 0
        while sent < len(names):
            places = lease.ready(names[sent:], most)
            if not places:
                if lease.state is State.HELD:
                    channel.post(Denied(f"block {names[sent]} is no part of this export"))
                    return False
                await lease.changed.wait()
                continue
            channel.post(Chunk(len(places)))
            channel.post(Checksums(await connection.write_from(self._pool.views(places))))
            sent += len(places)
        while lease.state is not State.HELD:
            await lease.changed.wait()
        return True
