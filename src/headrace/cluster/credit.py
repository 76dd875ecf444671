"""Whether a worker may be given more now, or requests had better wait at the gateway.

What waits at a worker is served in the order in which it came there, within its priority; what waits at
the gateway is still ordered by class and tenant. So a worker gets so much ahead that it never runs dry while
it tells of a step and is answered, and no more: prompt tokens of a few steps, sequences for a few rows beyond
those that it has. A more urgent class goes before the others at the worker too, so what they have queued
there must not keep it out: it may be further ahead.

In: tables of facts. Out: what fits now. Lengths in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.cluster.classes import Band
from headrace.cluster.facts import Fact, Table
from headrace.cluster.waiting import Needs

ROWS_AHEAD = 8
"""One sequence may wait at a worker for each so many rows: about those that end within a step or two."""
FURTHER = {Band.LOW: 0, Band.NORMAL: 1, Band.HIGH: 2}
"""Steps that a class may be ahead beyond those that all may; shares of rows alike."""


def has_credit(facts: Table, band: Band, steps_ahead: float, promised: float = 0.0) -> NDArray[np.bool_]:
    """Which workers may be given a request of this class: [workers].

    `promised` tokens are on their way to these, and nobody knows yet to whom.
    """
    further = FURTHER[band]
    ahead = facts[:, Fact.QUEUED] + facts[:, Fact.UNSEEN] + promised / max(1, len(facts))
    few = ahead < (steps_ahead + further) * facts[:, Fact.BUDGET]
    rows = facts[:, Fact.ROWS]
    spare = (1 + further) * np.maximum(1.0, rows // ROWS_AHEAD)
    found: NDArray[np.bool_] = few & (facts[:, Fact.OPEN_SAMPLES] < rows + spare)
    return found


@dataclass(frozen=True, slots=True)
class Credit:
    """What the workers of one model may be given now."""

    most_samples: int
    """That the roomiest has room for."""
    homes: frozenset[Band]
    """Classes for which a worker that decodes has credit."""
    prefills: frozenset[Band]
    """Classes for which a worker that prefills for others has credit, or none of those has room at all."""

    def fits(self, band: Band, needs: Needs) -> bool:
        if needs.samples > self.most_samples or band not in self.homes:
            return False
        return band in self.prefills or not needs.prefill


def credit_of(homes: Table, prefills: Table, steps_ahead: float, promised: float) -> Credit:
    """`homes` and `prefills` are those that have room at all."""
    room = homes[:, Fact.MOST_SAMPLES] - homes[:, Fact.OPEN_SAMPLES]
    return Credit(
        int(room.max()) if len(room) else 0,
        frozenset(band for band in Band if has_credit(homes, band, steps_ahead).any()),
        frozenset(
            band
            for band in Band
            if not len(prefills) or has_credit(prefills, band, steps_ahead, promised).any()
        ),
    )
