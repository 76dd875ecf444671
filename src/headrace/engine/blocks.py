"""The pool of KV blocks: who holds each one, what it is known to contain, and which goes next.

A block is `held` (a sequence's reference is on it), else `leased` or `quarantined` (it is pinned for a
transport that reads or writes it), else `cached` (its content has an identity and may be found again) or
`free`. Always: free + cached + held + leased + quarantined == total. Eviction takes the block that has been
cached the longest. Every change of what can be found is a numbered event, so that a router elsewhere can
mirror the index and notice a gap.

The pool knows nothing of tokens, sequences or groups: an identity is opaque bytes.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable

import msgspec


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """From event `number` on, `block` can be found under `identity`."""

    number: int
    identity: bytes
    block: int


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """From event `number` on, `identity` can no longer be found."""

    number: int
    identity: bytes


KVEvent = BlockStored | BlockRemoved


class Pin(enum.Enum):
    """Why a block that no sequence needs is kept."""

    LEASED = 0
    """It is complete, and waits to be fetched."""
    QUARANTINED = 1
    """Its handoff failed, and a transport may still touch it."""


class BlockPool:
    """`total` blocks of equal size, numbered from 0."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a KV cache needs at least one block, got {total}")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._references = [0] * total  # of sequences
        self._pins: dict[int, list[int]] = {}  # [leases, quarantines] of blocks that have any
        self._pinned = [0, 0]  # blocks leased, and quarantined
        self._identity: list[bytes | None] = [None] * total
        self._by_identity: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # cached blocks nobody holds, oldest first
        self._events: list[KVEvent] = []
        self._event_number = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._unheld)

    @property
    def known(self) -> int:
        """Blocks, held or not, that can be found by their content."""
        return len(self._by_identity)

    @property
    def held(self) -> int:
        return self.total - len(self._free) - len(self._unheld) - sum(self._pinned)

    @property
    def leased(self) -> int:
        """Blocks without a sequence that wait to be fetched."""
        return self._pinned[Pin.LEASED.value]

    @property
    def quarantined(self) -> int:
        """Blocks without a sequence or a lease that a transport may still touch."""
        return self._pinned[Pin.QUARANTINED.value]

    @property
    def available(self) -> int:
        """Blocks that `take` can give: free ones and cached ones nobody holds."""
        return len(self._free) + len(self._unheld)

    def take(self, count: int) -> list[int]:
        """Give `count` blocks with one reference each; the caller has checked `available`."""
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._unheld.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def find(self, identity: bytes) -> int | None:
        """The block that holds this content, if any; takes no reference."""
        return self._by_identity.get(identity)

    def references(self, block: int) -> int:
        """How many hold or pin a block."""
        pins = self._pins.get(block)
        return self._references[block] + (sum(pins) if pins else 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each."""
        for block in blocks:
            if self._references[block] == 0:
                if self._pins and block in self._pins:
                    self._pinned[self._kind(block)] -= 1
                else:
                    del self._unheld[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference from each; the first one given is the first to be evicted later."""
        for block in blocks:
            if self._references[block] <= 0:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._pins and block in self._pins:
                    self._pinned[self._kind(block)] += 1
                else:
                    self._put_back(block)

    def pin(self, blocks: Iterable[int], pin: Pin) -> None:
        """Keep blocks that are held or pinned, whatever their sequences do; several pins add up."""
        for block in blocks:
            pins, held = self._pins.get(block), self._references[block] > 0
            if pins is None:
                if not held:
                    raise RuntimeError(f"block {block} was pinned and nobody holds it")
                pins = self._pins[block] = [0, 0]
            elif not held:
                self._pinned[self._kind(block)] -= 1
            pins[pin.value] += 1
            if not held:
                self._pinned[self._kind(block)] += 1

    def unpin(self, blocks: Iterable[int], pin: Pin) -> None:
        """Drop one pin of each; what nobody holds or pins any more can be taken or found again."""
        for block in blocks:
            pins, held = self._pins.get(block), self._references[block] > 0
            if pins is None or pins[pin.value] <= 0:
                raise RuntimeError(f"block {block} is not {pin.name.lower()}")
            if not held:
                self._pinned[self._kind(block)] -= 1
            pins[pin.value] -= 1
            if not any(pins):
                del self._pins[block]
                if not held:
                    self._put_back(block)
            elif not held:
                self._pinned[self._kind(block)] += 1

    def publish(self, block: int, identity: bytes) -> None:
        """State what a held, fully written block contains. A second copy of known content stays anonymous."""
        if self._identity[block] is None and identity not in self._by_identity:
            self._identity[block] = identity
            self._by_identity[identity] = block
            self._event_number += 1
            self._events.append(BlockStored(self._event_number, identity, block))

    def take_events(self) -> list[KVEvent]:
        """The events since the last call, in order of their numbers, which leave no gap."""
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Raise RuntimeError where the books do not balance. O(total); for tests and idle moments."""
        held = {block for block, count in enumerate(self._references) if count > 0}
        free, unheld = set(self._free), set(self._unheld)
        kinds = [self._kind(block) for block in self._pins if block not in held]
        if any(block in free or block in unheld for block in self._pins):
            raise RuntimeError("a pinned block is free or cached")
        if kinds.count(0) != self.leased or kinds.count(1) != self.quarantined:
            raise RuntimeError(
                f"{self.leased} blocks are said to be leased and {self.quarantined} quarantined, "
                f"and {kinds.count(0)} and {kinds.count(1)} are"
            )
        if len(free) != len(self._free) or held & free or held & unheld or free & unheld:
            raise RuntimeError("a block is in two of free, cached and held")
        if len(held) + len(free) + len(unheld) + len(kinds) != self.total or len(held) != self.held:
            raise RuntimeError(
                f"free {len(free)} + cached {len(unheld)} + held {len(held)} + leased {self.leased} "
                f"+ quarantined {self.quarantined} is not total {self.total}"
            )
        if any(self._identity[block] is not None for block in free):
            raise RuntimeError("a free block still has an identity")
        if any(self._identity[block] is None for block in unheld):
            raise RuntimeError("a cached block has no identity")
        identities = sum(identity is not None for identity in self._identity)
        if identities != len(self._by_identity) or any(
            self._identity[block] != identity for identity, block in self._by_identity.items()
        ):
            raise RuntimeError("the index and the blocks disagree about an identity")

    def _kind(self, block: int) -> int:
        """What a pinned block without a sequence counts as: a lease outweighs a quarantine."""
        return 0 if self._pins[block][0] else 1

    def _put_back(self, block: int) -> None:
        if self._identity[block] is None:
            self._free.append(block)
        else:
            self._unheld[block] = None

    def _forget(self, block: int) -> None:
        identity = self._identity[block]
        if identity is not None:
            self._identity[block] = None
            del self._by_identity[identity]
            self._event_number += 1
            self._events.append(BlockRemoved(self._event_number, identity))
