"""What becomes of each class when twice as many requests come as can be served.

In virtual time on modelled workers (docs/simulation.md); gateway, admission, queue, routing, schedulers and
handoffs are the code that serves. First the capacity: the highest goodput over rates, with one class and
nothing refused. Then 0.7 and 2 times as many requests come, at random; 30% of them are of high priority.

Two workloads: one in which prefill is scarce, for how classes fare, with a burst of twice as many again; one
in which decoding is, whose load shows only after the prefill, for whether refusals oscillate, with the naive
rule beside it.

Exit status 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

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

WARM = 1 / 3
"""Of the time, for an empty cluster to fill; what arrives in it does not count."""
STEP = 1.12
"""Between two rates at which goodput is measured."""
WINDOW_S = 2.0
HIGH_MET, HIGH_SHARE, THROWN, CALM, UNSTEADY, APART = 0.95, 1 / 3, 0.02, 0.01, 5.0, 3.0
"""Bounds: attainment of high priority, its TTFT against that of low, prompts computed in vain, refusals at
0.7 times the capacity, unsteadiness of refusals, and how many times as unsteady the naive rule is."""


def capacity(scenario: Scenario, seconds: float, seed: int, console: Console) -> float:
    """The highest goodput in requests a second, of one class, nothing refused."""
    fleet, best, rate = scenario.fleet(early_rejection=False), 0.0, scenario.load.rate * 0.9
    found = []
    while True:
        load = replace(scenario.load, rate=rate, seconds=seconds, shares={Band.NORMAL: 1.0})
        counted = simulate(load.arrivals(seed), fleet).between(WARM * seconds)
        goodput = counted.goodput(scenario.slo.ttft_s, scenario.slo.tpot_s)
        found.append(f"{goodput:.1f} of {rate:.1f}")
        if goodput < 0.9 * best:
            console.print(f"goodput of what is offered, requests a second: {', '.join(found)}")
            return best
        best, rate = max(best, goodput), rate * STEP


def offered(scenario: Scenario, rate: float, seconds: float) -> Load:
    """With a burst in the middle of the time that counts."""
    begin_s = (1 + WARM) / 2 * seconds
    return replace(
        scenario.load, rate=rate, seconds=seconds, burst_at_s=begin_s, burst_s=0.05 * seconds, burst=2.0
    )


def serve(scenario: Scenario, load: Load, policy: str, seed: int) -> tuple[FleetResult, list[Arrival]]:
    arrivals = load.arrivals(seed)
    return simulate(arrivals, scenario.fleet(policy=policy)), arrivals


def show(
    title: str, scenario: Scenario, whole: FleetResult, arrivals: list[Arrival], console: Console
) -> FleetResult:
    """A table by class; returns what counts."""
    counted = whole.between(WARM * arrivals[-1].at_s)
    table = Table("class", title=title)
    for heading in ("requests", "refused", "met SLO", "mean TTFT"):
        table.add_column(heading, justify="right")
    for band, one in by_class(counted, arrivals, scenario.limits).items():
        ttft = "-" if math.isnan(one.mean_ttft_s) else f"{one.mean_ttft_s:.2f} s"
        table.add_row(band, f"{one.asked}", f"{one.refusals:.1%}", f"{one.attainment:.1%}", ttft)
    console.print(table)
    return counted


def windows(counted: FleetResult, arrivals: list[Arrival], seconds: float) -> list[Window]:
    return over_time(may_be_refused(counted, arrivals), WARM * seconds, seconds, WINDOW_S)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of virtual time a run (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (1)")
    asked = parser.parse_args()
    seconds, seed = asked.seconds, asked.seed
    console = Console(width=160, highlight=False)
    bounds: list[tuple[str, float, float, bool]] = []

    most = capacity(PROMPTS, seconds / 2, seed, console)
    console.print(f"prefill is scarce: capacity {most:.1f} requests a second")
    calm, arrivals = serve(PROMPTS, offered(PROMPTS, 0.7 * most, seconds), "predictive", seed)
    counted = show("prefill is scarce, 0.7 x capacity", PROMPTS, calm, arrivals, console)
    figures = by_class(counted, arrivals, PROMPTS.limits)
    refused = sum(one.refused for one in figures.values()) / sum(one.asked for one in figures.values())
    bounds.append(("refused at 0.7 x capacity", refused, CALM, refused < CALM))

    full, arrivals = serve(PROMPTS, offered(PROMPTS, 2 * most, seconds), "predictive", seed)
    counted = show("prefill is scarce, 2 x capacity", PROMPTS, full, arrivals, console)
    figures = by_class(counted, arrivals, PROMPTS.limits)
    high, low = figures[Band.HIGH], figures[Band.LOW]
    share, thrown = high.mean_ttft_s / low.mean_ttft_s, thrown_away(full)
    bounds.append(("SLO of high priority", high.attainment, HIGH_MET, high.attainment >= HIGH_MET))
    bounds.append(("TTFT of high priority / low", share, HIGH_SHARE, share <= HIGH_SHARE))
    bounds.append(("prompts computed in vain", thrown, THROWN, thrown <= THROWN))

    most = capacity(ANSWERS, seconds / 2, seed, console)
    console.print(f"decoding is scarce: capacity {most:.1f} requests a second")
    swings = {}
    for policy in ("predictive", "naive"):
        steady_load = replace(ANSWERS.load, rate=2 * most, seconds=seconds)
        result, arrivals = serve(ANSWERS, steady_load, policy, seed)
        counted = show(f"decoding is scarce, 2 x capacity, {policy}", ANSWERS, result, arrivals, console)
        seen = windows(counted, arrivals, seconds)
        swings[policy] = unsteadiness(seen)
        series = " ".join(f"{window.refused}/{window.asked}" for window in seen)
        console.print(f"refused of those not high, by {WINDOW_S:g} s: {series}")
        console.print(f"unsteadiness {swings[policy]:.1f}, computed in vain {thrown_away(result):.1%}")
        if policy == "predictive":
            high, thrown = by_class(counted, arrivals, ANSWERS.limits)[Band.HIGH], thrown_away(result)
            bounds.append(
                ("SLO of high priority, decoding", high.attainment, HIGH_MET, high.attainment >= HIGH_MET)
            )
            bounds.append(("computed in vain, decoding", thrown, THROWN, thrown <= THROWN))
    steady, naive = swings["predictive"], swings["naive"]
    bounds.append(("unsteadiness of refusals", steady, UNSTEADY, steady <= UNSTEADY))
    bounds.append(("naive rule / that", naive / steady, APART, naive >= APART * steady))

    table = Table("", title="bounds")
    for heading in ("found", "bound", ""):
        table.add_column(heading, justify="right")
    for name, found, bound, met in bounds:
        table.add_row(name, f"{found:.3f}", f"{bound:.3f}", "met" if met else "MISSED")
    console.print(table)
    return 0 if all(met for *_, met in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
