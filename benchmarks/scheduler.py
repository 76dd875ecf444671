"""Microseconds that the scheduler takes to plan and commit one step of decoding, without an executor.

Each of 1, 32 and 256 running sequences gets one token a step. Medians and 99th percentiles over steps, for
full attention and for a model with sliding windows; a step at which sequences fill a block also hashes and
publishes it. The last line has 32 running and one waiting whose long, cached prompt does not fit: it must
not cost more than the running ones do.

The expectation is under 100 µs at 32 sequences.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from rich.console import Console
from rich.table import Table

from headrace.engine import GroupSpec, KVCache, Scheduler, SchedulerConfig, StepPlan, StepResult
from headrace.protocol.requests import GenerateRequest, SamplingParams

BLOCK_SIZE = 16
PROMPT = 64
LIMIT_US = 100.0
FULL = (GroupSpec(),)
SLIDING = (GroupSpec(), GroupSpec(512), GroupSpec(512))


def scheduler(running: int, steps: int, groups: tuple[GroupSpec, ...]) -> Scheduler:
    """A scheduler whose `running` sequences all decode."""
    length = PROMPT + steps + 64
    blocks = running * (-(-length // BLOCK_SIZE) + 1) * len(groups)
    config = SchedulerConfig(
        max_model_len=1 << 20,
        vocab_size=1 << 15,
        max_num_seqs=running + 1,
        max_num_batched_tokens=512 + running,
    )
    made = Scheduler(config, KVCache(num_blocks=blocks, block_size=BLOCK_SIZE, groups=groups))
    for i in range(running):
        # Prompts of different lengths, so that not all sequences fill a block in the same step.
        prompt = [(i + j) % 1000 for j in range(PROMPT + i % BLOCK_SIZE)]
        made.add(_request(f"r{i}", prompt, max_tokens=1 << 19))
    plan, _ = _step(made)
    while made.num_waiting or any(row.count > 1 for row in plan.rows):
        plan, _ = _step(made)
    return made


def with_a_blocked_head(steps: int) -> Scheduler:
    """32 that decode, and one waiting whose prompt of 8000 tokens is nearly all cached and does not fit."""
    running, prompt = 32, [j % 997 for j in range(8000)]
    config = SchedulerConfig(
        max_model_len=1 << 20, vocab_size=1 << 15, max_num_seqs=running + 1, max_num_batched_tokens=1024
    )
    blocks = 8000 // BLOCK_SIZE + running * ((PROMPT + steps) // BLOCK_SIZE + 4)
    made = Scheduler(config, KVCache(num_blocks=blocks, block_size=BLOCK_SIZE))
    made.add(_request("warm", prompt, max_tokens=1))
    while made.has_work:
        _step(made)
    for i in range(running):
        made.add(_request(f"r{i}", [i] * PROMPT, max_tokens=1 << 19))
    _step(made)
    _step(made)
    short = made.cache.pool.available * BLOCK_SIZE - len(prompt)
    made.add(_request("head", prompt + [1] * (short + BLOCK_SIZE), max_tokens=1))
    return made


def _request(name: str, prompt: list[int], *, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def _step(made: Scheduler) -> tuple[StepPlan, float]:
    """One step; the seconds that planning and committing took."""
    began = time.perf_counter()
    plan = made.schedule()
    planned = time.perf_counter()
    if plan is None:
        raise RuntimeError("nothing to plan: the benchmark's sequences have run out of blocks")
    result = StepResult(tokens=[[7] if row.sample else [] for row in plan.rows])
    answered = time.perf_counter()
    made.commit(plan, result)
    made.take_outputs()
    made.cache.pool.take_events()
    return plan, planned - began + time.perf_counter() - answered


def measure(made: Scheduler, steps: int) -> tuple[float, float]:
    """Median and 99th percentile of a step, in µs."""
    times = sorted(_step(made)[1] * 1e6 for _ in range(steps))
    return statistics.median(times), times[int(len(times) * 0.99)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps measured for each line (1000)")
    steps: int = parser.parse_args().steps
    table = Table(
        "running", "KV groups", "µs per step", "99%", "µs per sequence", title="plan + commit, decode"
    )
    slowest = 0.0
    for groups, kind in ((FULL, "full"), (SLIDING, "full + 2 sliding")):
        for running in (1, 32, 256):
            median, most = measure(scheduler(running, steps, groups), steps)
            table.add_row(str(running), kind, f"{median:.1f}", f"{most:.1f}", f"{median / running:.2f}")
            if running == 32:
                slowest = max(slowest, median)
    blocked = with_a_blocked_head(steps)
    median, most = measure(blocked, steps)
    if blocked.num_waiting != 1:
        raise RuntimeError("the head of the queue was to wait through all steps, and did not")
    table.add_row("32 + 1 waiting", "full", f"{median:.1f}", f"{most:.1f}", f"{median / 32:.2f}")
    slowest = max(slowest, median)
    console = Console()
    console.print(table)
    verdict = "met" if slowest < LIMIT_US else "MISSED"
    console.print(f"under {LIMIT_US:.0f} µs at 32 sequences: {verdict} ({slowest:.1f} µs)")
    return 0 if slowest < LIMIT_US else 1


if __name__ == "__main__":
    sys.exit(main())
