"""What members that send no KV events may hold: the prompts sent to them, for as long as that is likely.

A guess, written into the `KVIndex` that events of other members go to, so that one match answers for all. It
is bounded for each member: by a number of blocks, of which the least recently used goes first, as it does in
the worker's own cache, and by age, since what else the worker does with its cache is not known here.

Every call takes the time, `now`, in seconds of one clock that never goes back.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

from headrace.cluster.kv_index import KVIndex


class ApproximateHoldings:
    """Writes guesses into an index, for the slots whose members send no events."""

    def __init__(self, index: KVIndex, *, max_age_s: float) -> None:
        """A block not sent again for `max_age_s` is no longer believed to be there."""
        if max_age_s <= 0:
            raise ValueError(f"max_age_s must be above 0 seconds, got {max_age_s}")
        self._index = index
        self._max_age_s = max_age_s
        self._used: dict[int, OrderedDict[bytes, float]] = {}
        """By slot: when each block was sent, the oldest first."""
        self._oldest: list[tuple[float, int]] = []
        """A heap of (a time that no block of the slot is older than, slot)."""
        self._queued: set[int] = set()
        """Slots in that heap: all that have blocks, and perhaps some that have none any more."""

    def sent(self, slot: int, chain: Sequence[bytes], now: float, *, max_blocks: int) -> None:
        """A prompt with these blocks went to a member whose cache has `max_blocks`."""
        self._index.store(slot, chain)
        used = self._used.setdefault(slot, OrderedDict())
        # Of one chain, the end goes first: without its beginning it is of no use.
        for identity in reversed(chain):
            used[identity] = now
            used.move_to_end(identity)
        surplus = [used.popitem(last=False)[0] for _ in range(len(used) - max_blocks)]
        self._index.remove(slot, surplus)
        if used and slot not in self._queued:
            self._queued.add(slot)
            heapq.heappush(self._oldest, (now, slot))

    def expire(self, now: float) -> None:
        """Take what is too old out of the index. Called before a match; costs little when nothing is."""
        limit = now - self._max_age_s
        while self._oldest and self._oldest[0][0] <= limit:
            _, slot = heapq.heappop(self._oldest)
            used = self._used.get(slot, OrderedDict())
            gone = []
            for identity, at in used.items():
                if at > limit:
                    heapq.heappush(self._oldest, (at, slot))
                    break
                gone.append(identity)
            else:
                self._queued.discard(slot)
            for identity in gone:
                del used[identity]
            if gone:
                self._index.remove(slot, gone)

    def forget(self, slot: int) -> None:
        """Believe nothing to be there: the cache has gone. To be called before the slot is given up."""
        if self._used.pop(slot, None):
            self._index.clear(slot)
