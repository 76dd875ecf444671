"""Which workers hold which KV blocks, as the router asks it: how much of this prompt is where?

Members get small numbers, slots, so that an answer is one array over all of them. What a member holds is told
by the numbered events that it sends, or guessed by `approximate_holdings.py`; both write here, so one look-up
answers for all. Identities are those of `engine/identity.py`; what differs in key, fingerprint or block size
never has equal ones, and so can share an index.

Knows nothing of events, workers or scores. The table is in C++ (native/src/kv_index.h): a million blocks take
40 MiB with up to 64 slots and 93 MiB with 512. The end of a member, or a snapshot of one that held something,
looks at every block once (10 to 25 ms for a million); all else only at the blocks named.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace import _native


class KVIndex:
    """Sets of slots by the identity of a block."""

    def __init__(self) -> None:
        self._table = _native.KVIndex()
        self._names: list[str | None] = []  # by slot
        self._slots: dict[str, int] = {}
        self._free: list[int] = []  # a heap

    @property
    def slots(self) -> int:
        """The length of a match: slots in use, and those below them that are free."""
        return len(self._names)

    def name(self, slot: int) -> str | None:
        """Whose slot it is; None for a free one."""
        return self._names[slot]

    def slot(self, name: str) -> int | None:
        """The slot of a member, if it is one."""
        return self._slots.get(name)

    def add_member(self, name: str) -> int:
        """The lowest free slot, which is now this member's; it holds nothing yet."""
        if name in self._slots:
            raise ValueError(
                f"{name!r} already has slot {self._slots[name]} of the KV index; remove it first"
            )
        if self._free:
            slot = heapq.heappop(self._free)
            self._names[slot] = name
        else:
            slot = len(self._names)
            self._table.widen(slot + 1)
            self._names.append(name)
        self._slots[name] = slot
        return slot

    def remove_member(self, name: str) -> None:
        """Forget a member and what it holds; its slot is free. Raises KeyError for one that is not there."""
        slot = self._slots.pop(name)
        self._table.clear(slot)
        self._names[slot] = None
        heapq.heappush(self._free, slot)

    def store(self, slot: int, identities: Sequence[bytes]) -> None:
        """These blocks are there now. What already was changes nothing, here as in `remove`.

        Raises ValueError, and changes nothing, where an identity is not 16 bytes or the slot is free.
        """
        self._check(slot)
        self._table.store(slot, identities)

    def remove(self, slot: int, identities: Sequence[bytes]) -> None:
        """These blocks are no longer there."""
        self._check(slot)
        self._table.remove(slot, identities)

    def replace(self, slot: int, identities: Sequence[bytes]) -> None:
        """These blocks and no others are there: a snapshot."""
        self._check(slot)
        self._table.replace(slot, identities)

    def clear(self, slot: int) -> None:
        """Nothing is there."""
        self._check(slot)
        self._table.clear(slot)

    def blocks(self, slot: int) -> int:
        """How many blocks are there."""
        self._check(slot)
        return self._table.blocks(slot)

    def match(self, chain: Sequence[bytes]) -> NDArray[np.int32]:
        """`[slots]`: how many blocks of the chain, from its first on, each slot holds without a gap."""
        leading = np.empty(len(self._names), np.int32)
        self._table.match(chain, leading)
        return leading

    def __len__(self) -> int:
        """Blocks that some member holds, each counted once."""
        return len(self._table)

    @property
    def memory_bytes(self) -> int:
        """What the table takes."""
        return self._table.memory_bytes()

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._names) or self._names[slot] is None:
            raise ValueError(
                f"slot {slot} of the KV index is no member's; members have {sorted(self._slots.values())}"
            )
