"""Microseconds that a routing decision takes, and decisions per second, on one core.

A decision names the blocks of a prompt of 2,000 tokens (125 blocks of 16) by keyed hashes, asks the KV index
how many of them each worker holds, scores every worker with the default policy, predicts its TTFT and TPOT,
and keeps all of it to be explained. Prompts share one of 64 system prompts of 512 tokens; each is held
by one to four workers to different depths, a million (block, worker) pairs in all. They are asked about in
random order, so most of what a look-up touches is in no cache near the core. The list of tokens is new each
time, as that of a prompt just tokenised is.

Microseconds are medians. Decisions a second are those of a core that does nothing else: the CPU time of all,
whatever else ran meanwhile.

The expectation is 5,000 decisions a second with 64 workers and 1,000 with 512.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from headrace.cluster.holdings import Holdings, Prompt
from headrace.cluster.options import RoutingOptions
from headrace.cluster.placement import possible_homes
from headrace.cluster.registry import Member
from headrace.cluster.routing import Decision, Router, Wish
from headrace.engine.identity import BlockHasher
from headrace.protocol.channel import Channel
from headrace.protocol.messages import (
    BlockNames,
    EngineInfo,
    FromWorker,
    KVSnapshot,
    Role,
    StepStats,
    WorkerInfo,
)

BLOCK_SIZE = 16
PROMPT = 2000
SYSTEM_PROMPT = 512
VOCABULARY = 128_000
PAIRS = 1_000_000
SALT = "shared:"
Tokens = NDArray[np.uint32]
WANTED = {64: 5000.0, 512: 1000.0}
"""Decisions a second by workers."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A gateway's knowledge of its workers, and prompts of which they hold much, some or only the system
    prompt."""

    hasher: BlockHasher
    holdings: Holdings
    members: list[Member]
    router: Router
    prompts: list[Tokens]
    pairs: int


@dataclass(frozen=True, slots=True)
class Measured:
    times_us: list[float]
    cpu_s: float


def cluster(workers: int, rng: random.Random) -> Cluster:
    key = rng.randbytes(32)
    hasher, prompts = BlockHasher(key, b"benchmark", BLOCK_SIZE), []
    holdings = Holdings(key, b"guess")
    root = hasher.root(SALT)
    members = [_member(f"worker-{number}", hasher, rng) for number in range(workers)]
    held: list[dict[bytes, None]] = [{} for _ in members]
    system_prompts = [_tokens(rng, SYSTEM_PROMPT) for _ in range(64)]
    pairs = 0
    while pairs < PAIRS:
        for _ in range(64):
            prompt = np.concatenate((rng.choice(system_prompts), _tokens(rng, PROMPT - SYSTEM_PROMPT)))
            chain = hasher.chain(root, prompt.tolist())
            for worker in rng.sample(range(workers), rng.choice((1, 1, 1, 2, 4))):
                depth = rng.randint(SYSTEM_PROMPT // BLOCK_SIZE, len(chain))
                held[worker].update(dict.fromkeys(chain[:depth]))
            prompts.append(prompt)
        pairs = sum(map(len, held))
    for member, blocks in zip(members, held, strict=True):
        holdings.joined(member)
        holdings.snapshot(member, KVSnapshot(1, list(blocks)))
    router = Router(RoutingOptions(), holdings, rng)
    return Cluster(hasher, holdings, members, router, prompts, pairs)


def _member(name: str, hasher: BlockHasher, rng: random.Random) -> Member:
    """A worker that has run steps, holds blocks and has a queue."""
    engine = EngineInfo(
        model="benchmark",
        revision="0",
        numerics="none",
        dtype="bfloat16",
        batch_invariant=True,
        max_model_len=8192,
        vocab_size=VOCABULARY,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_waiting=1024,
        block_size=BLOCK_SIZE,
        num_blocks=65_536,
        block_bytes=1,
        weight_bytes=1,
        prefix_caching=True,
        block_names=BlockNames(hasher.fingerprint, 0, hasher.key_check),
        kv_layout="none",
        threads=1,
        pid=0,
    )
    info = WorkerInfo(worker_id=name, generation=1, role=Role.BOTH, data_address="", engine=engine)
    member = Member(info, cast(Channel[FromWorker], None), heard_s=0.0)
    for step in range(64):
        running, tokens = rng.randrange(1, 64), rng.randrange(1, 2048)
        stats = StepStats(
            step=step,
            tokens=tokens,
            sampled=running,
            rows=running,
            step_s=0.01 + 1e-5 * tokens,
            kernel_s=0.01,
            running=running,
            waiting=0,
            queued_tokens=rng.randrange(0, 8000),
            blocks_free=1000,
            blocks_cached=40_000,
            blocks_held=24_536,
            blocks_leased=0,
            blocks_quarantined=0,
            held_tokens=running * 1000,
            preemptions=0,
            prefix_queries=0,
            prefix_hits=0,
            evictions=0,
        )
        member.told(stats, 0.0)
    member.open_samples = rng.randrange(0, 64)
    return member


def _tokens(rng: random.Random, count: int) -> Tokens:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, VOCABULARY, count, dtype=np.uint32)


def decide(made: Cluster, tokens: list[int]) -> Decision:
    """From the tokens of a prompt to the decision, as the gateway does it."""
    possible = possible_homes(made.members, 1)
    wish = Wish("request", len(tokens), 128, 1)
    return made.router.choose(possible, wish, Prompt(tokens, SALT), purpose="decode", now=0.1)[1]


def name(made: Cluster, tokens: list[int]) -> list[bytes]:
    """The part of a decision that is hashing."""
    return Prompt(tokens, SALT).chain(made.hasher)


def measure(part: Callable[[Cluster, list[int]], object], made: Cluster, prompts: list[Tokens]) -> Measured:
    """For each prompt, after a few that count for nothing."""
    for prompt in prompts[:100]:
        part(made, prompt.tolist())
    times: list[float] = []
    cpu_s = 0.0
    for prompt in prompts:
        tokens = prompt.tolist()
        before, began = time.thread_time(), time.perf_counter()
        part(made, tokens)
        times.append((time.perf_counter() - began) * 1e6)
        cpu_s += time.thread_time() - before
    return Measured(times, cpu_s)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decisions", type=int, default=3000, help="decisions measured for each line (3000)")
    decisions: int = parser.parse_args().decisions
    console, missed = Console(), False
    for workers, wanted in WANTED.items():
        rng = random.Random(workers)
        made = cluster(workers, rng)
        prompts = [rng.choice(made.prompts) for _ in range(decisions)]
        whole, hashing = (measure(part, made, prompts) for part in (decide, name))
        table = Table("", "median µs", "99% µs", title=f"{workers} workers, {made.pairs:,} pairs")
        for row, measured in (("a decision", whole), ("of it hashing the prompt", hashing)):
            times = sorted(measured.times_us)
            table.add_row(row, f"{statistics.median(times):.1f}", f"{times[int(len(times) * 0.99)]:.1f}")
        console.print(table)
        per_second = decisions / whole.cpu_s
        met = per_second >= wanted
        missed |= not met
        console.print(
            f"{per_second:,.0f} decisions a second, {wanted:,.0f} wanted: {'met' if met else 'MISSED'}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
