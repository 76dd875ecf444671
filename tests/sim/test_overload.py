"""Twice as many requests as can be served, in small: `benchmarks/overload.py` has the figures.

Virtual time: how busy the machine is changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.cluster.classes import Band
from headrace.sim.fleet import simulate
from headrace.sim.fleet_result import FleetResult
from headrace.sim.overload import (
    ANSWERS,
    PROMPTS,
    Load,
    Scenario,
    Window,
    by_class,
    may_be_refused,
    over_time,
    thrown_away,
    unsteadiness,
)
from headrace.sim.trace import Arrival

SEED = 1
CAPACITY = 8.5
"""Of `PROMPTS`, requests a second, as the benchmark finds it."""
HALF = replace(ANSWERS, prefill=4, decode=1)
HALF_CAPACITY = 12.5


def serve(scenario: Scenario, load: Load, policy: str = "predictive") -> tuple[FleetResult, list[Arrival]]:
    arrivals = load.arrivals(SEED)
    return simulate(arrivals, scenario.fleet(policy=policy)), arrivals


def test_high_priority_is_served_when_all_is_full_and_little_is_computed_in_vain() -> None:
    load = replace(PROMPTS.load, rate=2 * CAPACITY, seconds=24.0)
    whole, arrivals = serve(PROMPTS, load)
    figures = by_class(whole.between(8.0), arrivals, PROMPTS.limits)
    high, low = figures[Band.HIGH], figures[Band.LOW]
    assert high.asked > 60
    assert high.refused == 0
    assert high.attainment >= 0.95
    assert low.asked > low.refused > 0
    assert high.mean_ttft_s <= low.mean_ttft_s / 3
    assert thrown_away(whole) <= 0.02


def test_nobody_is_refused_while_all_can_be_served() -> None:
    load = replace(PROMPTS.load, rate=0.7 * CAPACITY, seconds=15.0)
    whole, arrivals = serve(PROMPTS, load)
    assert not any(one.refused for one in by_class(whole, arrivals, PROMPTS.limits).values())
    assert all(one.complete for one in whole.requests)
    assert thrown_away(whole) <= 0.001


def test_refusals_are_steady_and_by_the_naive_rule_they_are_not() -> None:
    load = replace(HALF.load, rate=2 * HALF_CAPACITY, seconds=44.0)
    found, figures = {}, {}
    for policy in ("predictive", "naive"):
        whole, arrivals = serve(HALF, load, policy)
        windows = over_time(may_be_refused(whole, arrivals), 20.0, 44.0, 2.0)
        found[policy] = unsteadiness(windows)
        figures[policy] = by_class(whole.between(20.0), arrivals, HALF.limits)[Band.HIGH].attainment
    assert 0 < found["predictive"] <= 5
    assert found["naive"] >= 3 * found["predictive"]
    assert figures["predictive"] >= max(0.95, figures["naive"])


def test_arrivals_are_as_asked_for() -> None:
    load = Load(rate=50.0, seconds=40.0, burst_at_s=20.0, burst_s=4.0, burst=3.0)
    arrivals = load.arrivals(3)
    assert arrivals == load.arrivals(3)
    assert arrivals != load.arrivals(4)
    inside = sum(20.0 <= arrival.at_s < 24.0 for arrival in arrivals)
    assert inside == pytest.approx(600, rel=0.15)
    assert len(arrivals) - inside == pytest.approx(1800, rel=0.1)
    high = sum(arrival.priority < 0 for arrival in arrivals) / len(arrivals)
    assert high == pytest.approx(0.3, abs=0.04)
    assert {arrival.tenant for arrival in arrivals} == {"t0", "t1", "t2", "t3"}
    assert all(4000 <= arrival.input_length <= 12_000 for arrival in arrivals)


def test_a_rule_that_lets_in_all_and_then_none_is_unsteady() -> None:
    assert unsteadiness([Window(10, 5)] * 8) == 0.0  # the same in each
    assert unsteadiness([Window(10, 10), Window(10, 0)] * 4) == pytest.approx(200 / 7 / 5)
    assert unsteadiness([Window(10, 0)] * 8) == 0.0
    assert unsteadiness([]) == 0.0
