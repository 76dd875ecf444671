"""What happened to a request on its way, step by step, for those who ask afterwards.

In: entries as they happen. Out: the last `KEPT` requests by their id. It must not decide anything.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

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

    def note(self, now: float, what: str, worker: str = "", **detail: str | int | float) -> None:
        self.entries.append(Entry(now - self.began_s, what, worker, detail))


class Journeys:
    """The last requests; those that still run are always among them, since they are bounded too."""

    def __init__(self) -> None:
        self._journeys: OrderedDict[str, Journey] = OrderedDict()

    def begin(self, request_id: str, prompt_tokens: int, now: float) -> Journey:
        journey = Journey(request_id, prompt_tokens, now, [])
        self._journeys[request_id] = journey
        while len(self._journeys) > KEPT:
            self._journeys.popitem(last=False)
        return journey

    @property
    def most(self) -> int:
        """How many requests are kept."""
        return KEPT

    def of(self, name: str) -> list[Journey]:
        """The request of this id, or all that were made of it: NAME-0, NAME-1, … for its prompts."""
        if (exact := self._journeys.get(name)) is not None:
            return [exact]
        return [journey for key, journey in self._journeys.items() if key.rpartition("-")[0] == name]
