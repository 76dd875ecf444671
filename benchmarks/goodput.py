"""Goodput of routing policies on a trace, against an ideal cluster whose workers share one cache.

Everything but the hardware is real: gateway, routing, schedulers, prefix caches, handoffs run in virtual time
on modelled workers (docs/simulation.md). The ideal has one cache of the size of all caches together, which
every worker reads at no cost, and its KV blocks travel in no time. So where a request goes matters for queues
only, which its gateway keeps with policy `cost` as well.

All of them refuse what they foresee to miss its objectives (`qos.early_rejection`): above capacity
queues would grow and hardly anybody be served in time, whatever the policy. `--admit-all` refuses nothing.
A request counts towards goodput when its first token comes within --ttft seconds and its further ones within
--tpot on average. Requests of the first --warm share of the trace fill the caches and do not count.

Prints a table, and writes the curve over rates as an SVG where --plot says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cluster.options import AdmissionOptions, ServiceLevels
from headrace.sim.fleet import PLANNED, FleetOptions, simulate
from headrace.sim.fleet_setup import choose_worker
from headrace.sim.trace import at_rate, read_arrivals

IDEAL = "ideal"
POLICIES = (
    *("cost", "latency", "capacity", "prefix", "session", "least_loaded", "power_of_two", "round_robin"),
    "random",
)
SIMPLER = ("capacity", "prefix", "session", "least_loaded", "power_of_two", "round_robin", "random")
CACHE_TOKENS = 1_000_000
MAX_MODEL_LEN = 131_072
AT_ONCE = 1e18
"""Bytes a second."""
WANTED = 0.9
"""Of the ideal's goodput, for the default policy."""

Run = dict[str, Any]


def run(job: tuple[str, float, argparse.Namespace]) -> Run:
    """One simulation: what came of it."""
    name, rate, asked = job
    worker = choose_worker(asked.hardware, asked.model, asked.devices, CACHE_TOKENS)
    policy = "cost" if name == IDEAL else name
    gateway = replace(
        PLANNED,
        routing=replace(PLANNED.routing, policy=policy),
        split=replace(PLANNED.split, prompt_length_threshold=asked.threshold),
        admission=AdmissionOptions(early_rejection=not asked.admit_all, reject_on_slo_violation=True),
        slo=ServiceLevels(ttft_s=asked.ttft, tpot_s=asked.tpot),
    )
    options = FleetOptions(
        cost=worker.cost,
        prefill=asked.prefill,
        decode=asked.decode,
        cache_tokens=CACHE_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        nic_bytes_per_s=AT_ONCE if name == IDEAL else worker.nic_bytes_per_s,
        ideal_cache=name == IDEAL,
        stride=asked.stride,
        gateway=gateway,
    )
    arrivals = at_rate(read_arrivals(asked.trace, MAX_MODEL_LEN)[: asked.requests], rate)
    whole = simulate(arrivals, options)
    counted = whole.between(arrivals[int(asked.warm * len(arrivals))].at_s)
    (ttft_s,) = counted.quantiles(lambda one: one.ttft_s, [0.5])
    return {
        "policy": name,
        "rate": rate,
        "goodput": counted.goodput(asked.ttft, asked.tpot),
        "attainment": counted.attainment(asked.ttft, asked.tpot),
        "hit_rate": counted.hit_rate,
        "ttft_s": ttft_s,
        "mean_ttft_s": statistics.fmean(one.ttft_s for one in counted.requests if one.complete),
        "cpu_s": whole.cpu_s,
    }


def table(runs: list[Run], rates: list[float], policies: list[str], requests: int) -> Table:
    by = {(one["policy"], one["rate"]): one for one in runs}
    made = Table(
        "policy", title=f"goodput, requests a second (attainment, hit rate, mean TTFT); {requests} requests"
    )
    for rate in rates:
        made.add_column(f"{rate:g} /s", justify="right")
    for policy in policies:
        cells = []
        for rate in rates:
            one = by[policy, rate]
            shares = f"{one['attainment']:.0%}, {one['hit_rate']:.0%}"
            cells.append(f"{one['goodput']:.2f} ({shares}, {one['mean_ttft_s']:.1f} s)")
        made.add_row(policy, *cells)
    return made


def plot(path: Path, runs: list[Run], rates: list[float], policies: list[str]) -> None:
    """Goodput over offered rate, a line for each policy."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for policy in policies:
        line = [
            one["goodput"] for rate in rates for one in runs if (one["policy"], one["rate"]) == (policy, rate)
        ]
        axes.plot(rates, line, marker="o", label=policy, linestyle="--" if policy == IDEAL else "-")
    axes.plot(rates, rates, color="lightgrey", label="offered")
    axes.set(xlabel="offered requests a second", ylabel="goodput, requests a second", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="a trace of Mooncake's format")
    parser.add_argument("--requests", type=int, default=2000, help="the first so many (2000)")
    parser.add_argument("--rates", default="6,8,10,12", help="requests a second, with commas (6,8,10,12)")
    parser.add_argument(
        "--policies", default=",".join((IDEAL, *POLICIES)), help="with commas (all, and ideal)"
    )
    parser.add_argument("--prefill", type=int, default=8, help="workers (8)")
    parser.add_argument("--decode", type=int, default=8, help="workers (8)")
    parser.add_argument("--hardware", default="h100", help="of the workers (h100)")
    parser.add_argument("--model", default="llama-70b", help="that they serve (llama-70b)")
    parser.add_argument("--devices", type=int, help="of each worker (as memory asks for)")
    parser.add_argument("--ttft", type=float, default=10.0, help="objective, seconds (10)")
    parser.add_argument("--tpot", type=float, default=0.1, help="objective, seconds (0.1)")
    parser.add_argument(
        "--threshold", type=int, default=8192, help="prompt tokens above which others prefill (8192, a step)"
    )
    parser.add_argument("--warm", type=float, default=0.3, help="share of requests that do not count (0.3)")
    parser.add_argument("--admit-all", action="store_true", help="refuse nothing")
    parser.add_argument(
        "--stride", type=int, default=1, help="decode steps run as one; above 1 foreseen TPOT is wrong (1)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="simulations at a time (1)")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    asked = parser.parse_args()
    rates, policies = [float(rate) for rate in asked.rates.split(",")], asked.policies.split(",")
    jobs = [(policy, rate, asked) for rate in rates for policy in policies]
    runs: list[Run] = []
    console = Console(width=200)
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for one in pool.imap(run, jobs):
            runs.append(one)
            print(
                f"{len(runs)} of {len(jobs)}: {one['policy']} at {one['rate']:g}/s: {one['goodput']:.2f} "
                f"({one['cpu_s']:.0f} s of CPU)",
                file=sys.stderr,
                flush=True,
            )
    console.print(table(runs, rates, policies, asked.requests))
    if asked.plot is not None:
        plot(asked.plot, runs, rates, policies)
    if asked.json is not None:
        asked.json.write_text(json.dumps(runs, indent=1))
    return 0 if judged(runs, policies, console) else 1


def judged(runs: list[Run], policies: list[str], console: Console) -> bool:
    """Whether `cost` comes near the ideal at every rate, and serves more than simpler policies over all."""
    curves = {
        policy: [one["goodput"] for one in runs if one["policy"] == policy]
        for policy in policies  # in order of rates
    }
    if "cost" not in curves:
        return True
    met = True
    if IDEAL in curves:
        ratios = [ours / max(1e-9, best) for ours, best in zip(curves["cost"], curves[IDEAL], strict=True)]
        met = min(ratios) >= WANTED
        found = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        console.print(f"cost / ideal: {found}; wanted {WANTED}: {'met' if met else 'MISSED'}")
    for policy in SIMPLER:
        if policy in curves:
            more = sum(curves["cost"]) / sum(curves[policy])
            met &= more > 1.0
            console.print(f"cost / {policy}, over all rates: {more:.2f}: {'met' if more > 1.0 else 'MISSED'}")
    return met


if __name__ == "__main__":
    sys.exit(main())
