"""How much comes of each class: prompt tokens a second, over the last seconds.

In: requests as they are accepted. Out: rates. Who is to wait will be overtaken by what comes meanwhile of the
more urgent classes, so a wait cannot be foreseen without them. Times in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.cluster.classes import RANKS, Band

MEMORY_S = 30.0
"""Over about so long; what came before fades."""
LEAST_S = 3.0
"""Of less time no rate is told."""
FORGOTTEN = 0.01
"""Of a sample is no sample."""


@dataclass(slots=True)
class Came:
    """A number of each."""

    tokens: float = 0.0
    """Of prompts, that were to be computed."""
    samples: float = 0.0


class Demand:
    """Of one model."""

    def __init__(self) -> None:
        self._came = {band: Came() for band in Band}
        self._began_s = math.inf
        self._at_s = -math.inf

    def came(self, band: Band, tokens: float, samples: int, now: float) -> None:
        """A request was accepted, with so many prompt tokens to compute."""
        self._fade(now)
        self._began_s = min(self._began_s, now)
        self._came[band].tokens += tokens
        self._came[band].samples += samples

    def more_urgent(self, band: Band, now: float) -> Came:
        """What comes in a second of the classes above this one; nothing where none came for long."""
        self._fade(now)
        above = [came for other, came in self._came.items() if RANKS[other] < RANKS[band]]
        samples = sum(came.samples for came in above)
        if samples < FORGOTTEN:
            return Came()
        age_s = max(now - self._began_s, LEAST_S)
        remembered_s = MEMORY_S * -math.expm1(-age_s / MEMORY_S)
        return Came(sum(came.tokens for came in above) / remembered_s, samples / remembered_s)

    def _fade(self, now: float) -> None:
        left = math.exp(-max(0.0, now - self._at_s) / MEMORY_S)
        self._at_s = max(now, self._at_s)
        for came in self._came.values():
            came.tokens *= left
            came.samples *= left
