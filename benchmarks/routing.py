"""Microseconds that the parts of a routing decision take, and decisions per second, on one core.

A decision names the blocks of a prompt of 2,000 tokens (125 blocks of 16) by keyed hashes and asks the KV
index how many of them each worker holds. Prompts share one of 64 system prompts of 512 tokens; each is held
by one to four workers to different depths, a million (block, worker) pairs in all. They are asked about in
random order, so most of what a look-up touches is in no cache near the core. The list of tokens is new each
time, as that of a prompt just tokenised is.

Microseconds are medians. Decisions a second are those of a core that does nothing else: the CPU time of all,
whatever else ran meanwhile.

The expectation, for all parts together, is 5,000 decisions a second with 64 workers and 1,000 with 512.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from headrace.cluster.kv_index import KVIndex
from headrace.engine.identity import BlockHasher

BLOCK_SIZE = 16
PROMPT = 2000
SYSTEM_PROMPT = 512
VOCABULARY = 128_000
PAIRS = 1_000_000
Tokens = NDArray[np.uint32]
WANTED = {64: 5000.0, 512: 1000.0}
"""Decisions a second by workers."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A full index, and prompts of which it knows much, some or only the system prompt."""

    hasher: BlockHasher
    root: bytes
    index: KVIndex
    prompts: list[Tokens]
    pairs: int
    stored_us: float
    """For one pair."""


@dataclass(frozen=True, slots=True)
class Part:
    """A step of a decision: takes what the one before it gave."""

    name: str
    run: Callable[..., object]


def cluster(workers: int, rng: random.Random) -> Cluster:
    hasher, index, prompts = BlockHasher(rng.randbytes(32), b"benchmark", BLOCK_SIZE), KVIndex(), []
    root = hasher.root("")
    for worker in range(workers):
        index.add_member(f"worker-{worker}")
    system_prompts = [_tokens(rng, SYSTEM_PROMPT) for _ in range(64)]
    pairs, spent = 0, 0.0
    while pairs < PAIRS:
        for _ in range(64):
            prompt = np.concatenate((rng.choice(system_prompts), _tokens(rng, PROMPT - SYSTEM_PROMPT)))
            chain = hasher.chain(root, prompt.tolist())
            before = time.thread_time()
            for worker in rng.sample(range(workers), rng.choice((1, 1, 1, 2, 4))):
                index.store(worker, chain[: rng.randint(SYSTEM_PROMPT // BLOCK_SIZE, len(chain))])
            spent += time.thread_time() - before
            prompts.append(prompt)
        pairs = sum(index.blocks(slot) for slot in range(workers))
    return Cluster(hasher, root, index, prompts, pairs, spent / pairs * 1e6)


def _tokens(rng: random.Random, count: int) -> Tokens:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, VOCABULARY, count, dtype=np.uint32)


def parts(made: Cluster) -> list[Part]:
    hasher, root, index = made.hasher, made.root, made.index
    return [
        Part("hash the prompt", lambda prompt: hasher.chain(root, prompt)),
        Part("match 125 blocks", index.match),
    ]


def measure(steps: list[Part], prompts: list[Tokens]) -> tuple[list[list[float]], float]:
    """µs of each part for each prompt, [parts][prompts], and the CPU seconds of all."""
    times: list[list[float]] = [[] for _ in steps]
    cpu_s = 0.0
    for prompt in prompts:
        given: object = prompt.tolist()
        before = time.thread_time()
        for step, taken in zip(steps, times, strict=True):
            began = time.perf_counter()
            given = step.run(given)
            taken.append((time.perf_counter() - began) * 1e6)
        cpu_s += time.thread_time() - before
    return times, cpu_s


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
        steps = parts(made)
        prompts = [rng.choice(made.prompts) for _ in range(decisions)]
        times, cpu_s = measure(steps, prompts)
        table = Table("part", "median µs", "99% µs", title=f"{workers} workers, {made.pairs:,} pairs")
        for step, taken in zip(steps, times, strict=True):
            table.add_row(step.name, f"{statistics.median(taken):.1f}", f"{_most(taken):.1f}")
        whole = [sum(taken) for taken in zip(*times, strict=True)]
        table.add_row("all", f"{statistics.median(whole):.1f}", f"{_most(whole):.1f}")
        console.print(table)
        per_second = decisions / cpu_s
        met = per_second >= wanted
        missed |= not met
        console.print(
            f"{per_second:,.0f} decisions a second, {wanted:,.0f} wanted: {'met' if met else 'MISSED'}"
        )
        before = time.thread_time()
        made.index.clear(0)
        cleared_ms = (time.thread_time() - before) * 1e3
        console.print(
            f"index: {len(made.index):,} blocks in {made.index.memory_bytes / 2**20:.0f} MiB; "
            f"storing {made.stored_us:.2f} µs a pair; forgetting a worker {cleared_ms:.1f} ms\n"
        )
    return 1 if missed else 0


def _most(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


if __name__ == "__main__":
    sys.exit(main())
