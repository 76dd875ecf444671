"""The target's legs of handoffs: from reserved blocks to decoding, whatever becomes of the pull.

In: what the engine reserved, and the gateway's `Fetch` and `Begin`, in any order that faults may give them.
Out: to the engine one `Continue`, or one `Release` for what was given up; to the gateway how the pull ended.

State    | enters it by                       | leaves it by
---------|------------------------------------|-----------------------------------------------------------
RESERVED | the engine says `Reserved`         | `fetch` → PULLING; `begin` → gone, prefilled here; `drop`
PULLING  | the gateway says `Fetch`           | the pull ends → SETTLED; `drop` → gone when it is quiet
SETTLED  | the pull has ended                 | `begin` → gone, decoding or prefilled here; `drop`

A begin that comes while PULLING is kept. One without tokens says that nobody computes the blocks any more,
and ends the pull; one with tokens that all blocks are computed, so the rest of the pull has little time.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.protocol.engine_messages import Continue, Release
from headrace.protocol.handoff import Cause, Reserved, Ticket
from headrace.protocol.messages import ImportSettled
from headrace.transfer import Connector, Fetched, Patience, Pool, TransferFailed, fetch
from headrace.world import World


@dataclass(slots=True, eq=False)
class _Import:
    reserved: Reserved
    pull: asyncio.Task[Fetched] | None = None
    settled: ImportSettled | None = None
    generated: list[int] | None = None
    """What the gateway said to begin with."""
    dropped: bool = False
    patience: Patience = field(default_factory=Patience)


class Imports:
    """All imports of one life of an engine."""

    def __init__(
        self,
        world: World,
        pool: Pool,
        *,
        to_engine: Callable[[Continue | Release], None],
        settled: Callable[[ImportSettled], None],
        report: Callable[[str], None] = lambda line: None,
        connector: Connector | None = None,
    ) -> None:
        """`report` gets lines for people."""
        self._world = world
        self._pool = pool
        self._to_engine = to_engine
        self._tell_settled = settled
        self._report = report
        self._connector = connector or Connector()
        self._open: dict[str, _Import] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def close(self) -> None:
        """The engine's life is over: end all pulls and say nothing."""
        pulls = [one.pull for one in self._open.values() if one.pull is not None]
        self._open.clear()
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)

    def reserved(self, event: Reserved) -> None:
        """The engine has the blocks."""
        self._open[event.request_id] = _Import(event)

    def fetch(self, request_id: str, ticket: Ticket) -> None:
        """Fill the blocks; a second wish is ignored."""
        one = self._open.get(request_id)
        if one is not None and one.pull is None and one.settled is None and not one.dropped:
            pull = fetch(self._world, self._pool, one.reserved, ticket, one.patience, self._connector)
            one.pull = asyncio.create_task(pull, name="worker.pull")
            # Not the end of a coroutine of our own: one that is cancelled before it began never runs at all.
            one.pull.add_done_callback(functools.partial(self._pulled, request_id, one, ticket))

    def begin(self, request_id: str, generated: list[int]) -> None:
        """Decode after these tokens; see the module's words."""
        one = self._open.get(request_id)
        if one is None:
            # The engine has not told of its blocks, or needs none: it knows what to do.
            self._to_engine(Continue(request_id, False, generated))
            return
        one.generated = generated
        if one.pull is None:
            self._continue(request_id, one)
        elif not generated:
            one.pull.cancel()
        else:
            one.patience.source_is_done()

    def drop(self, request_id: str) -> None:
        """The engine has given the import up; its blocks are released when nothing writes there."""
        one = self._open.get(request_id)
        if one is None:
            self._to_engine(Release(request_id))
            return
        one.dropped = True
        if one.pull is None:
            self._continue(request_id, one)
        else:
            one.pull.cancel()

    def _pulled(self, request_id: str, one: _Import, ticket: Ticket, pull: asyncio.Task[Fetched]) -> None:
        """A pull has ended, in whatever way."""
        fetched: Fetched | None = None
        cause, reason = Cause.ABANDONED, "nobody computes the blocks any more"
        error = None if pull.cancelled() else pull.exception()
        if self._open.get(request_id) is not one:
            return  # closed
        if isinstance(error, TransferFailed):
            cause, reason = error.cause, str(error)
        elif error is not None:  # a defect here, or a ticket that nobody foresaw: the prompt is computed
            cause, reason = Cause.LOST, f"the pull failed with {type(error).__name__}: {error}"
            self._report(f"KV blocks from {ticket.worker_id} at {ticket.address}: {reason}")
        elif not pull.cancelled():
            fetched = pull.result()
        one.pull = None
        self._world.trace("import", request_id, "imported" if fetched else reason)
        if fetched is None:
            one.settled = ImportSettled(request_id, False, cause, reason)
        else:
            one.settled = ImportSettled(
                request_id,
                True,
                bytes_moved=fetched.bytes_moved,
                blocks=fetched.blocks,
                wait_s=fetched.wait_s,
                move_s=fetched.move_s,
                read=fetched.read,
            )
        if not one.dropped:
            self._tell_settled(one.settled)
        self._continue(request_id, one)

    def _continue(self, request_id: str, one: _Import) -> None:
        """Go on if all is known that is needed."""
        if one.dropped:
            del self._open[request_id]
            self._to_engine(Release(request_id))
        elif one.generated is not None:
            del self._open[request_id]
            imported = one.settled is not None and one.settled.imported and bool(one.generated)
            self._to_engine(Continue(request_id, imported, one.generated))
