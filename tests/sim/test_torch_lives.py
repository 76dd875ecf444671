"""A few lives with torch on a tiny model: what hashes prove holds for the executor that serves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.sim.life import live
from headrace.sim.search import Scope

STEPS = 600
"""Fewer than a standard life has: here a step computes a model."""


@pytest.mark.parametrize("seed", range(3))
def test_a_life_on_torch(seed: int) -> None:
    report = live(seed, replace(Scope(executor="torch").plan(seed), steps=STEPS))
    assert report.steps >= STEPS
    assert report.endings["length"] > 20
