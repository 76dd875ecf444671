"""Which share of requests got what their class may expect, over the last minutes and the last hour.

In: how long a request's first token, or a sample's further ones, took. Out: for each class and limit, how
many were judged and how many of them met it. A judgement adds one to a number of the present slot of a ring;
sums are made when somebody asks, so what a window costs is not paid by requests.

Burn rate: how fast the error budget is spent, 1 being just as fast as the objective allows (Site Reliability
Workbook, chapter 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from headrace.cluster.classes import Band, Slo
from headrace.cluster.options import GatewayOptions

SLOT_S = 15
"""A window is as long as its name says, and up to a slot longer."""
WINDOWS = {"5m": 300, "1h": 3600}
"""In seconds."""

_SLOTS = max(WINDOWS.values()) // SLOT_S + 1  # the present one too
_KINDS = {kind: 2 * number for number, kind in enumerate(product(Band, Slo))}
"""Where a slot has how many met a limit of a class; next to it, how many did not."""


@dataclass(frozen=True, slots=True)
class Attainment:
    """Of one limit of one class, over one window."""

    band: Band
    slo: Slo
    window: str
    limit_s: float
    judged: int
    met: int
    objective: float

    @property
    def ratio(self) -> float | None:
        """The share that met the limit; None where nothing was judged."""
        return self.met / self.judged if self.judged else None

    @property
    def burn_rate(self) -> float | None:
        """What was missed against what may be; None where nothing was judged."""
        return None if self.ratio is None else (1 - self.ratio) / (1 - self.objective)


class ServiceRecord:
    """For one gateway. `now` is its world's clock, in seconds."""

    def __init__(self, options: GatewayOptions, now: Callable[[], float]) -> None:
        slo, low_s = options.slo, options.admission.low_priority_threshold_s
        self.objective = slo.objective
        self.limits_s = {
            (band, which): slo.tpot_s if which is Slo.TPOT else low_s if band is Band.LOW else slo.ttft_s
            for band, which in _KINDS
        }
        """What each class may expect."""
        self._now = now
        self._slots = [[0] * (2 * len(_KINDS)) for _ in range(_SLOTS)]
        self._numbers = [-1] * _SLOTS  # which slot of all time each one is

    def judge(self, band: Band, slo: Slo, took_s: float | None) -> bool:
        """Write down whether the limit was met, which None is not; returns it."""
        met = took_s is not None and took_s <= self.limits_s[band, slo]
        number = int(self._now() // SLOT_S)
        at = number % _SLOTS
        if self._numbers[at] != number:
            self._numbers[at] = number
            self._slots[at] = [0] * (2 * len(_KINDS))
        self._slots[at][_KINDS[band, slo] + (not met)] += 1
        return met

    def attainment(self) -> Iterator[Attainment]:
        """As it is now: every class, limit and window."""
        present = int(self._now() // SLOT_S)
        for window, seconds in WINDOWS.items():
            oldest = present - seconds // SLOT_S
            inside = [
                slot for number, slot in zip(self._numbers, self._slots, strict=True) if number >= oldest
            ]
            sums = [sum(column) for column in zip(*inside, strict=True)] or [0] * (2 * len(_KINDS))
            for (band, slo), at in _KINDS.items():
                met, missed = sums[at], sums[at + 1]
                limit_s = self.limits_s[band, slo]
                yield Attainment(band, slo, window, limit_s, met + missed, met, self.objective)


def together(records: Sequence[Sequence[Attainment]]) -> list[Attainment]:
    """The same of several records: each class, limit and window once."""
    return [
        replace(alike[0], judged=sum(one.judged for one in alike), met=sum(one.met for one in alike))
        for alike in zip(*records, strict=True)
    ]
