"""The legs of handoffs at one engine: what their blocks are kept for, and what is told of them.

An export tells which of its positions may be read, step by step; when its first token is sampled, its
blocks are *leased* until `release`. An import tells which blocks must be filled. A leg that ends before its
handoff did leaves the blocks that a transport may still touch in *quarantine*, until `release` too.

Scheduling, rows and outputs are the scheduler's; this room knows neither transports nor other engines.
"""

from __future__ import annotations

from bisect import insort

from headrace.engine.blocks import Pin
from headrace.engine.cache import KVCache, PrefixHit
from headrace.engine.sequence import Sequence
from headrace.protocol.handoff import (
    BlockSpan,
    Computed,
    Declined,
    Dropped,
    Exporting,
    HandoffEvent,
    Held,
    Leg,
    Reserved,
)


class Handoffs:
    """Legs that live, or have left blocks behind. Without any, every question here costs a falsy check."""

    def __init__(self, cache: KVCache, max_leased_blocks: int | None) -> None:
        self._cache = cache
        self._most = cache.pool.total // 2 if max_leased_blocks is None else max_leased_blocks
        self._kept: dict[str, tuple[Pin, list[int]]] = {}  # what ended legs left, until it is released
        self._exports: dict[Sequence, int] = {}  # those that run, and the blocks that they will lease
        self._events: list[HandoffEvent] = []
        self.importing: set[Sequence] = set()
        """Imports that have blocks and wait to be filled."""
        self.filled: list[Sequence] = []
        """Imports that wait for a row, by rank."""

    # ---- what is known -------------------------------------------------------------------------------

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    @property
    def empty(self) -> bool:
        """Whether nothing is told, kept or waited for."""
        return not (self._events or self._kept or self.importing or self.filled)

    @property
    def blocks_return(self) -> bool:
        """Whether blocks that nobody computes in will come back from outside."""
        return bool(self._kept or self.importing)

    def keeps(self, request_id: str) -> bool:
        return request_id in self._kept

    def take_events(self) -> list[HandoffEvent]:
        events, self._events = self._events, []
        return events

    # ---- exports -------------------------------------------------------------------------------------

    def accepted(self, sequence: Sequence, salt: str) -> None:
        """An export was accepted: say what it is going to compute."""
        length, identities = len(sequence.tokens), self._identities(sequence, salt)
        self._events.append(Exporting(sequence.request.request_id, length, identities))

    def may_lease(self, length: int) -> bool:
        """Whether an export of `length` positions may start, beside what is leased and what will be."""
        others = self._cache.pool.leased + sum(self._exports.values())
        return others == 0 or others + self._cache.visible_blocks(length) <= self._most

    def exporting(self, sequence: Sequence, length: int) -> None:
        """An export runs: what it will lease counts from now on."""
        self._exports[sequence] = self._cache.visible_blocks(length)

    def computed(self, sequence: Sequence) -> None:
        """An export came further: tell it, and blocks that were not told before."""
        handoff = sequence.handoff
        if handoff is None or sequence.computed <= handoff.told:
            return
        size = self._cache.block_size
        before, end = -(-handoff.told // size), -(-sequence.computed // size)
        firsts = self._cache.first_needed(handoff.length)
        spans = []
        for number, (first, table) in enumerate(zip(firsts, sequence.tables, strict=True)):
            if (start := max(first, before)) < end:
                spans.append(BlockSpan(number, start, table[start:end]))
        handoff.told = sequence.computed
        handoff.spans += spans
        self._events.append(Computed(sequence.request.request_id, handoff.told, spans))

    def hold(self, sequence: Sequence) -> None:
        """An export is complete: lease its blocks, before it gives them back."""
        self._keep(sequence, Pin.LEASED)
        self._events.append(Held(sequence.request.request_id))

    # ---- imports -------------------------------------------------------------------------------------

    def declines(self, sequence: Sequence, hit: PrefixHit | None) -> bool:
        """Whether an import is cheaper without a handoff; then it has none from now on."""
        handoff, cached = sequence.handoff, hit.length if hit is not None else 0
        if handoff is None or handoff.length - cached > handoff.offload_above:
            return False
        sequence.handoff = None
        self._events.append(Declined(sequence.request.request_id, cached))
        return True

    def reserve(self, sequence: Sequence, hit: PrefixHit, salt: str) -> None:
        """Give an import its blocks, and tell which are to be filled."""
        handoff = sequence.handoff
        if handoff is None:
            raise RuntimeError("what reserves blocks is an import")
        handoff.spans = self._cache.reserve(sequence, hit, handoff.length)
        self.importing.add(sequence)
        name, identities = sequence.request.request_id, self._identities(sequence, salt)
        self._events.append(Reserved(name, handoff.length, hit.length, list(handoff.spans), identities))

    def fill(self, sequence: Sequence) -> None:
        """An import's blocks hold its positions: let others find them, and wait for a row."""
        handoff = sequence.handoff
        if handoff is None:
            raise RuntimeError("what was filled is an import")
        handoff.filled = True
        sequence.scheduled = sequence.computed = handoff.length
        self._cache.advance(sequence)
        self.importing.discard(sequence)
        insort(self.filled, sequence, key=lambda one: one.rank)

    def starts(self, sequence: Sequence) -> None:
        """A filled import has a row: it is a sequence like others."""
        self.filled.remove(sequence)
        sequence.handoff = None

    def abandon(self, sequence: Sequence) -> None:
        """An import gives its blocks back, which no transport touches: it waits like others."""
        if sequence in self.importing:
            self.importing.discard(sequence)
        else:
            self.filled.remove(sequence)
        sequence.handoff = None
        self._cache.release(sequence)

    # ---- endings -------------------------------------------------------------------------------------

    def drop(self, sequence: Sequence) -> None:
        """A leg ends before its handoff did: quarantine what a transport may touch."""
        handoff = sequence.handoff
        if handoff is None or handoff.filled:
            return
        if handoff.leg is Leg.EXPORT or sequence in self.importing:
            self._keep(sequence, Pin.QUARANTINED)
            self._events.append(Dropped(sequence.request.request_id))

    def cancel(self, request_id: str) -> None:
        """Quarantine what an export holds that nobody wants any more."""
        pin, blocks = self._kept.get(request_id, (Pin.QUARANTINED, []))
        if pin is Pin.LEASED:
            self._cache.pool.pin(blocks, Pin.QUARANTINED)
            self._cache.pool.unpin(blocks, Pin.LEASED)
            self._kept[request_id] = (Pin.QUARANTINED, blocks)
            self._events.append(Dropped(request_id))

    def release(self, request_id: str) -> None:
        """Give back what a leg left: nothing, if it left nothing."""
        if request_id in self._kept:
            pin, blocks = self._kept.pop(request_id)
            self._cache.pool.unpin(reversed(blocks), pin)

    def _keep(self, sequence: Sequence, pin: Pin) -> None:
        self._exports.pop(sequence, None)
        blocks = sequence.handoff.blocks() if sequence.handoff is not None else []
        if blocks or pin is Pin.LEASED:
            self._cache.pool.pin(blocks, pin)
            self._kept[sequence.request.request_id] = (pin, blocks)

    def _identities(self, sequence: Sequence, salt: str) -> list[bytes]:
        return self._cache.identities(self._cache.root(salt), sequence.tokens)
