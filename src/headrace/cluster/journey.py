"""What happened to a request on its way, step by step, for those who ask afterwards.

In: entries as they happen, from before a request is let in. Out: by their id the requests that run, and the
last `KEPT` that have ended, and as many that were refused. It must not decide anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.cluster.routing import Decision

KEPT = 1000


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event, so many seconds after the request came."""

    at_s: float
    what: str
    worker: str = ""
    detail: dict[str, str | int | float] = {}


class Journey(msgspec.Struct):
    """One request from its coming on."""

    request_id: str
    prompt_tokens: int
    began_s: float
    entries: list[Entry] = []
    decisions: list[Decision] = []
    """Which workers were chosen, and why, in order."""

    def note(self, now: float, what: str, worker: str = "", /, **detail: str | int | float) -> None:
        self.entries.append(Entry(now - self.began_s, what, worker, detail))

    def as_json(self) -> dict[str, Any]:
        """For people and programs that ask; times in seconds from its coming."""
        found: dict[str, Any] = msgspec.to_builtins(
            {
                "id": self.request_id,
                "prompt_tokens": self.prompt_tokens,
                "events": [
                    {"at_s": round(e.at_s, 6), "what": e.what, "worker": e.worker or None, "detail": e.detail}
                    for e in self.entries
                ],
                "decisions": [
                    {
                        "at_s": round(decision.at_s - self.began_s, 6),
                        "purpose": decision.purpose,
                        "policy": decision.policy,
                        "rule": decision.rule,
                        "candidates": decision.considered(),
                    }
                    for decision in self.decisions
                ],
            }
        )
        return found


class Journeys:
    """The requests that run, whose number the workers' queues bound, and the last that have ended; beside
    these, so that a flood of them drives out none that was served, the last that were refused."""

    def __init__(self) -> None:
        self._open: dict[str, Journey] = {}
        self._ended: OrderedDict[str, Journey] = OrderedDict()
        self._refused: OrderedDict[str, Journey] = OrderedDict()

    def begin(self, request_id: str, prompt_tokens: int, now: float) -> Journey:
        journey = Journey(request_id, prompt_tokens, now, [], [])
        self._open[request_id] = journey
        return journey

    def end(self, journey: Journey) -> None:
        """Nothing more happens to the request."""
        self._close(journey, self._ended)

    def refuse(self, journey: Journey) -> None:
        """The request is not accepted."""
        self._close(journey, self._refused)

    def drop(self, journey: Journey) -> None:
        """The request was never made: whoever made it makes another of it."""
        self._open.pop(journey.request_id, None)

    def refused(self, request_id: str, now: float, **detail: str | int | float) -> None:
        """A call was refused before it was a request; what is known of it already is left as it is."""
        known = (request_id, f"{request_id}-0")
        if not any(name in journeys for name in known for journeys in self._all):
            journey = self.begin(request_id, 0, now)
            journey.note(now, "refused", **detail)
            self.refuse(journey)

    @property
    def most(self) -> int:
        """How many of the ended are kept, and of the refused."""
        return KEPT

    def of(self, name: str) -> list[Journey]:
        """The request of this id, or all that were made of it: NAME-0, NAME-1, … for its prompts."""
        for journeys in self._all:
            if name in journeys:
                return [journeys[name]]
        return [
            journey
            for journeys in reversed(self._all)
            for key, journey in journeys.items()
            if key.rpartition("-")[0] == name
        ]

    @property
    def _all(self) -> tuple[Mapping[str, Journey], ...]:
        return self._open, self._ended, self._refused

    def _close(self, journey: Journey, where: OrderedDict[str, Journey]) -> None:
        name = journey.request_id
        self._open.pop(name, None)
        self._ended.pop(name, None)  # that of an id which was used before, or what was taken back
        self._refused.pop(name, None)
        where[name] = journey
        if len(where) > KEPT:
            where.popitem(last=False)
