"""The sequences that wait to run, the smallest rank first."""

from __future__ import annotations

import heapq

from headrace.engine.sequence import Sequence


class WaitingQueue:
    """A heap by rank. What is removed from within leaves its entry until that is at the top, or until most
    entries are such: clients may come and go behind a first that waits for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._members: set[Sequence] = set()
        self.tokens = 0
        """To be computed for those that wait."""

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        self._members.add(sequence)
        self.tokens += sequence.queued_tokens
        heapq.heappush(self._heap, (sequence.rank, sequence))

    def first(self) -> Sequence | None:
        """Who is next; None if nobody waits."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits here: the first, which starts, or any other, which has ended."""
        self._members.remove(sequence)
        self.tokens -= sequence.queued_tokens
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
