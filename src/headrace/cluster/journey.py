"""What happened to a request on its way, step by step, for those who ask afterwards.

In: entries as they happen. Out: by their id the requests that run, and the last `KEPT` that have ended. It
must not decide anything.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from headrace.cluster.routing import Decision

KEPT = 1000


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event, so many seconds after the request was accepted."""

    at_s: float
    what: str
    worker: str = ""
    detail: dict[str, str | int | float] = {}


class Journey(msgspec.Struct):
    """One request from its acceptance on."""

    request_id: str
    prompt_tokens: int
    began_s: float
    entries: list[Entry] = []
    decisions: list[Decision] = []
    """Which workers were chosen, and why, in order."""

    def note(self, now: float, what: str, worker: str = "", **detail: str | int | float) -> None:
        self.entries.append(Entry(now - self.began_s, what, worker, detail))


class Journeys:
    """The requests that run, whose number the workers' queues bound, and the last that have ended."""

    def __init__(self) -> None:
        self._open: dict[str, Journey] = {}
        self._ended: OrderedDict[str, Journey] = OrderedDict()

    def begin(self, request_id: str, prompt_tokens: int, now: float) -> Journey:
        journey = Journey(request_id, prompt_tokens, now, [], [])
        self._open[request_id] = journey
        return journey

    def end(self, journey: Journey) -> None:
        """Nothing more happens to the request."""
        del self._open[journey.request_id]
        self._ended[journey.request_id] = journey
        self._ended.move_to_end(journey.request_id)
        while len(self._ended) > KEPT:
            self._ended.popitem(last=False)

    @property
    def most(self) -> int:
        """How many of the ended are kept."""
        return KEPT

    def of(self, name: str) -> list[Journey]:
        """The request of this id, or all that were made of it: NAME-0, NAME-1, … for its prompts."""
        if (exact := self._open.get(name) or self._ended.get(name)) is not None:
            return [exact]
        known = {**self._ended, **self._open}
        return [journey for key, journey in known.items() if key.rpartition("-")[0] == name]
