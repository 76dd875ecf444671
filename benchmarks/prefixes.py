"""How well routing finds repeated prefixes, and whether one that everybody asks for makes a worker hot.

Two workloads, in virtual time on modelled workers (docs/simulation.md); gateway, routing, prefix caches and
handoffs are the real ones.

Conversations: sessions of several turns, each of which begins with one of a few system prompts and goes on
with all that was said. Told are the share of prompt tokens that caches spared, and the share of long prompts
(above `prompt_length_threshold`) that a prefill worker computed; the home held so much of the rest that what
was left was short.

A hot prefix: questions after one of many documents, of which one is asked about ten times as often as each
other. Told is the most loaded worker's load against the mean of its pool: of time in steps, and of tokens
computed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from headrace.protocol.messages import Role
from headrace.sim.fleet import PLANNED, FleetOptions, simulate
from headrace.sim.fleet_result import FleetResult
from headrace.sim.fleet_setup import choose_worker
from headrace.sim.trace import Arrival, Piece, Sessions

MAX_MODEL_LEN = 131_072
WANTED_HITS = 0.8
WANTED_OFFLOADED = (0.6, 0.8)
WANTED_PEAK = 1.3

CONVERSATIONS = Sessions(
    system_prompts=8, system_length=4000, turns=6, turn_length=1000, output_length=200, gap_s=20.0
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Questions after a document, of which the first is `popularity` times as popular as each other."""

    count: int = 20
    length: int = 8000
    question_length: int = 600
    output_length: int = 150
    popularity: float = 10.0

    def arrivals(self, requests: int, rate: float, seed: int) -> Iterator[Arrival]:
        chance = random.Random(f"{seed} documents")
        weights = [self.popularity, *[1.0] * (self.count - 1)]
        at_s = 0.0
        for number in range(requests):
            at_s += chance.expovariate(rate)
            (document,) = chance.choices(range(self.count), weights)
            question = round(chance.uniform(0.5, 1.5) * self.question_length)
            output = max(1, round(chance.uniform(0.5, 1.5) * self.output_length))
            pieces = (Piece(document + 1, self.length), Piece(1_000_000 + number, question))
            yield Arrival(f"q{number}", at_s, pieces, output, seed=number)


def fleet(asked: argparse.Namespace, policy: str) -> FleetOptions:
    worker = choose_worker(asked.hardware, asked.model, asked.devices, asked.cache_tokens)
    return FleetOptions(
        cost=worker.cost,
        prefill=asked.prefill,
        decode=asked.decode,
        cache_tokens=asked.cache_tokens,
        block_size=64,
        max_model_len=MAX_MODEL_LEN,
        nic_bytes_per_s=worker.nic_bytes_per_s,
        gateway=replace(PLANNED, routing=replace(PLANNED.routing, policy=policy)),
        seed=asked.seed,
    )


def peaks(result: FleetResult, role: Role) -> list[float]:
    """The most loaded worker's time in steps, and its tokens, against the mean of its pool."""
    pool = [use for use in result.workers.values() if use.role is role]
    loads = [use.busy_s for use in pool], [use.tokens for use in pool]
    return [max(load) * len(load) / sum(load) for load in loads]


def conversations(asked: argparse.Namespace, console: Console) -> bool:
    options = fleet(asked, "cost")
    sessions = replace(CONVERSATIONS, rate=asked.sessions)
    arrivals = sessions.arrivals(asked.requests, asked.seed, MAX_MODEL_LEN)
    result = simulate(arrivals, options)
    counted = result.between(arrivals[int(asked.warm * len(arrivals))].at_s)
    threshold = options.gateway.split.prompt_length_threshold
    long = [one for one in counted.requests if one.prompt_tokens > threshold]
    offloaded = sum(bool(one.prefill) for one in long) / len(long)
    (ttft_s,) = counted.quantiles(lambda one: one.ttft_s, [0.5])
    low, high = WANTED_OFFLOADED
    mean = sum(one.prompt_tokens for one in counted.requests) / len(counted.requests)
    met = counted.hit_rate >= WANTED_HITS and low <= offloaded <= high
    console.print(
        f"conversations: {len(counted.requests)} requests, of {mean:.0f} prompt tokens in the mean; "
        f"hit rate {counted.hit_rate:.1%} (wanted {WANTED_HITS:.0%}), "
        f"{offloaded:.1%} of long prompts offloaded (wanted {low:.0%} to {high:.0%}), "
        f"median TTFT {ttft_s * 1e3:.0f} ms: {'met' if met else 'MISSED'}"
    )
    return met


def hot_prefix(asked: argparse.Namespace, console: Console) -> bool:
    arrivals = list(Documents().arrivals(asked.requests, asked.questions, asked.seed))
    table = Table(
        "policy", "prefill: most / mean", "decode: most / mean", "hit rate", "busy, prefill / decode"
    )
    met = True
    for policy in asked.policies.split(","):
        result = simulate(arrivals, fleet(asked, policy))
        pools = [peaks(result, role) for role in (Role.PREFILL, Role.DECODE)]
        used = [result.utilisation(role) for role in (Role.PREFILL, Role.DECODE)]
        if policy == "cost":
            met = max(max(pool) for pool in pools) <= WANTED_PEAK
        table.add_row(
            policy,
            *(" / ".join(f"{each:.2f}" for each in pool) for pool in pools),
            f"{result.hit_rate:.0%}",
            " / ".join(f"{each:.0%}" for each in used),
        )
    console.print(table)
    console.print(
        f"a hot prefix: wanted at most {WANTED_PEAK} with the policy cost: {'met' if met else 'MISSED'}"
    )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000, help="of each workload (2000)")
    parser.add_argument("--sessions", type=float, default=4.0, help="conversations that begin a second (4)")
    parser.add_argument("--questions", type=float, default=40.0, help="a second, of the hot prefix (40)")
    parser.add_argument("--policies", default="cost,prefix,least_loaded", help="of the hot prefix")
    parser.add_argument("--warm", type=float, default=0.2, help="share that does not count for hits (0.2)")
    parser.add_argument("--prefill", type=int, default=4, help="workers (4)")
    parser.add_argument("--decode", type=int, default=4, help="workers (4)")
    parser.add_argument("--cache-tokens", type=int, default=1_000_000, help="of each worker (1000000)")
    parser.add_argument("--hardware", default="h100", help="of the workers (h100)")
    parser.add_argument("--model", default="llama-70b", help="that they serve (llama-70b)")
    parser.add_argument("--devices", type=int, help="of each worker (as memory asks for)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    console = Console(width=120)
    met = [conversations(asked, console), hot_prefix(asked, console)]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
