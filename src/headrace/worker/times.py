"""When each sequence of a worker arrived, was first scheduled, and had its first token.

In: what the worker sees, with the time of its clock. Out: at each ending, the seconds of each phase. It must
not know the engine. What a step costs here is proportional to what began or ended in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.protocol.messages import SequenceTimes
from headrace.protocol.requests import SequenceOutput

SampleKey = tuple[str, int]
"""Request id and index of the sample."""


@dataclass(slots=True)
class _Milestones:
    arrived_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None


class Stopwatch:
    """Keeps a sequence's milestones from its arrival to its ending."""

    def __init__(self) -> None:
        self._open: dict[SampleKey, _Milestones] = {}

    def __len__(self) -> int:
        return len(self._open)

    def arrived(self, request_id: str, samples: Iterable[int], now: float) -> None:
        for index in samples:
            self._open[request_id, index] = _Milestones(now)

    def left(self, request_id: str, index: int) -> None:
        """A sample goes on elsewhere."""
        self._open.pop((request_id, index), None)

    def scheduled(self, samples: Iterable[SampleKey], now: float) -> None:
        """These run for the first time in the step that began at `now`."""
        for key in samples:
            self._open[key].scheduled_s = now

    def outputs(self, outputs: Iterable[SequenceOutput], now: float) -> list[SequenceTimes]:
        """Take note of what a step brought; the times of what ended in it, in order."""
        ended: list[SequenceTimes] = []
        for output in outputs:
            at = self._open.get((output.request_id, output.index))
            if output.tokens and at is not None and at.first_token_s is None:
                at.first_token_s = now
            if output.finish is not None:
                self._open.pop((output.request_id, output.index), None)
                ended.append(SequenceTimes() if at is None else _times(at, now))
        return ended


def _times(at: _Milestones, now: float) -> SequenceTimes:
    if at.scheduled_s is None:
        return SequenceTimes()
    queue_s = at.scheduled_s - at.arrived_s
    if at.first_token_s is None:
        return SequenceTimes(queue_s)
    return SequenceTimes(queue_s, at.first_token_s - at.scheduled_s, now - at.first_token_s)
