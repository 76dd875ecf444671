"""Whether a worker may be given more now, or requests had better wait at the gateway.

What waits at a worker is served in the order in which it came there, within its priority; what waits at
the gateway is still ordered by class and tenant. So a worker gets so much ahead that it never runs dry while
it tells of a step and is answered, and no more: prompt tokens of a few steps, sequences for a few rows beyond
those that it has. A more urgent class goes before the others at the worker too, so what they have queued
there must not keep it out: it may be further ahead.

In: tables of facts. Out: what fits now. Lengths in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.cluster.classes import Band
from headrace.cluster.facts import Fact, Table
from headrace.cluster.waiting import Needs

SHARE = 1 / 8
"""Of a worker's rows: so many sequences more may wait there, about those that end within a step or two. And
so much of its rows and blocks is kept for more urgent classes where such requests come: what these take from
others that run is computed once more."""
FURTHER = {Band.LOW: 0, Band.NORMAL: 1, Band.HIGH: 2}
"""Steps that a class may be ahead beyond those that all may; shares of rows alike."""


def has_credit(facts: Table, band: Band, steps_ahead: float, *, reserve: bool = False) -> NDArray[np.bool_]:
    """Which workers may be given a request of this class: [workers].

    With `reserve`, room is left for more urgent ones, which come too.
    """
    if not math.isfinite(steps_ahead):
        return np.ones(len(facts), dtype=bool)
    further = FURTHER[band]
    ahead = facts[:, Fact.QUEUED] + facts[:, Fact.UNSEEN]
    few = ahead < (steps_ahead + further) * facts[:, Fact.BUDGET]
    share = np.maximum(1.0, np.floor(facts[:, Fact.ROWS] * SHARE))
    if reserve:
        few &= facts[:, Fact.HELD_SHARE] < 1 - SHARE
        share = np.where(facts[:, Fact.ROWS] > 1, -share, 0.0)
    else:
        share *= 1 + further
    found: NDArray[np.bool_] = few & (facts[:, Fact.OPEN_SAMPLES] < facts[:, Fact.ROWS] + share)
    return found


@dataclass(frozen=True, slots=True)
class Credit:
    """What the workers of one model may be given now."""

    homes: Mapping[Band, int]
    """By class: how many samples the roomiest worker that decodes, and has credit for it, has room for."""
    prefills: frozenset[Band]
    """Classes for which a worker that prefills for others has credit, or none of those has room at all."""

    def fits(self, band: Band, needs: Needs) -> bool:
        if needs.samples > self.homes[band]:
            return False
        return band in self.prefills or not needs.prefill


def credit_of(homes: Table, prefills: Table, steps_ahead: float, reserved: Collection[Band]) -> Credit:
    """`homes` and `prefills` are those that have room at all, `reserved` the classes that leave a reserve."""

    def having(facts: Table, band: Band) -> NDArray[np.bool_]:
        return has_credit(facts, band, steps_ahead, reserve=band in reserved)

    room = homes[:, Fact.MOST_SAMPLES] - homes[:, Fact.OPEN_SAMPLES]
    return Credit(
        {band: int(room[having(homes, band)].max(initial=0.0)) for band in Band},
        frozenset(band for band in Band if not len(prefills) or having(prefills, band).any()),
    )
