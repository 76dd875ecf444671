"""Measuring the steps of a real engine, and the file in which what was found is kept.

In: an engine that nobody else uses, and a way to read memory. Out: measured steps over a small grid, each the
median of its repeats, the rate of memory, and a `Calibration` to write and to read again. Nothing here
imports torch: what uses it is handed in.

Steps are run on the executor itself, with rows that begin in the middle of a sequence; what lies in their KV
blocks does not matter for the time, if it was written once: whoever hands the engine in has seen to that.
What planning and committing take is measured beside it, with real requests, and counted to each step and row.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from headrace.engine import Engine
from headrace.engine.plan import Executor, RowStart, ScheduledRow, StepPlan, StepResult
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim.cost.fit import FitError, MeasuredStep
from headrace.sim.cost.models import ModelShape
from headrace.sim.cost.step import Rates, Row

FORMAT = 2
"""In 1 the rate of memory was fitted with the rest, and could be anything."""

HELD_OUT_EVERY = 3
"""One step of so many is not fitted, but tells how good the fit is."""

SHORTEST = 64
"""Tokens of the longest sequence: in fewer there is no room for a prompt and a context."""
FEWEST = 9
"""Steps, of which two thirds are fitted: more than there are unknowns."""

LOOP_BATCHES = (1, 8)
LOOP_TOKENS = 16

READS = 3
"""Of memory, in each turn."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine reaches with a model, as `headrace calibrate` writes it and the simulation reads it."""

    format: int = FORMAT
    machine: str
    """Numerics and threads, in the engine's words."""
    shape: ModelShape
    rates: Rates
    fitted: FitError
    held_out: FitError
    """On steps that the fit has not seen."""
    longest: int
    """Tokens of the longest sequence in a step that was measured."""

    def write(self, path: Path) -> None:
        """Raises OSError."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Raises OSError, ValueError that names the file and what is wrong with it."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no file of headrace calibrate: {error}") from None
        if found.format != FORMAT:
            raise ValueError(
                f"{path} has format {found.format}, and this Headrace reads {FORMAT}; run headrace calibrate "
                "again"
            )
        return found


def grid(max_model_len: int, max_rows: int, max_tokens: int, kv_tokens: int) -> list[tuple[Row, ...]]:
    """Steps to measure: prompts, decodes and both, as far as the engine's limits allow. All in tokens.

    Raises ValueError where these leave too few to tell anything of longer sequences.
    """
    if max_model_len < SHORTEST:
        raise ValueError(
            f"the longest sequence is {max_model_len} tokens, and steps at several contexts are measured; at "
            f"least {SHORTEST} are needed, so raise --max-model-len or --kv-cache-memory"
        )
    contexts = [length for length in (16, 256, 1024, 2048, 4096) if length < max_model_len // 2]
    batches = [count for count in (1, 2, 4, 8, 16, 32) if count <= max_rows]
    chunks = [count for count in (16, 48, 128, 256, 512) if count <= max_tokens]
    decodes = [((1, context),) * batch for batch in batches for context in contexts]
    prompts = [((chunk, context),) for chunk in chunks for context in (0, *contexts[1:])]
    several = [((chunk // 4, 0),) * 4 for chunk in chunks if chunk >= 64]
    mixed = [
        ((chunk - batch, 0), *(((1, context),) * batch))
        for chunk in chunks[1:]
        for batch, context in ((4, contexts[0]), (8, contexts[-1]))
        if batch < min(chunk, max_rows)
    ]
    found = [
        rows
        for rows in (*decodes, *prompts, *several, *mixed)
        if sum(new + context for new, context in rows) <= kv_tokens
        and sum(new for new, _ in rows) <= max_tokens
        and all(new + context < max_model_len for new, context in rows)
    ]
    if len(found) < FEWEST:
        raise ValueError(
            f"only {len(found)} kinds of steps fit into {kv_tokens} tokens of KV cache and {max_rows} "
            f"sequences, and {FEWEST} are needed; raise --kv-cache-memory"
        )
    return found


def split(steps: Sequence[MeasuredStep]) -> tuple[list[MeasuredStep], list[MeasuredStep]]:
    """Those to fit, and those to test the fit with: the same whenever the grid is."""
    order = list(range(len(steps)))
    random.Random(0).shuffle(order)
    held = {i for place, i in enumerate(order) if place % HELD_OUT_EVERY == 0}
    kept = [step for i, step in enumerate(steps) if i not in held]
    return kept, [step for i, step in enumerate(steps) if i in held]


async def measure(
    engine: Engine,
    steps: Sequence[tuple[Row, ...]],
    repeats: int,
    clock: Callable[[], float],
    read: Callable[[], int],
    heard: Callable[[], None] = lambda: None,
) -> tuple[list[MeasuredStep], float]:
    """Run all steps `repeats` times in turn, after one round that is not counted; each with its median, and
    bytes a second at which `read`, which says how many it reads, does so with the same threads.

    They take turns since other work on a machine comes in spells: it should not meet all of one step's
    repeats. `heard` is called for each step that was run.
    """
    taken: list[list[float]] = [[] for _ in steps]
    read_s: list[float] = []
    for turn in range(repeats + 1):
        for rows, times in zip(steps, taken, strict=True):
            *before, timed = _plans(engine, rows)
            for plan in before:
                await engine.executor.submit(plan)
            began = clock()
            await engine.executor.submit(timed)
            seconds = clock() - began
            if turn > 0:
                times.append(seconds)
            heard()
            await asyncio.sleep(0)  # where Ctrl-C is heard
        for _ in range(READS):
            began = clock()
            size = read()
            read_s.append(clock() - began)
    found = [MeasuredStep(rows, statistics.median(times)) for rows, times in zip(steps, taken, strict=True)]
    return found, size / statistics.median(read_s[READS:])


def _plans(engine: Engine, rows: tuple[Row, ...]) -> list[StepPlan]:
    """What to run, last the step itself. Each row has blocks of its own.

    Decodes go on from a step before, as they do in life; that a prompt begins takes hardly any time beside
    its arithmetic.
    """
    cache = engine.scheduler.cache
    goes_on = all(new == 1 and context > 0 for new, context in rows)
    starts, used = [], 0
    for place, (new, context) in enumerate(rows):
        blocks = -(-(new + context + 1) // cache.block_size)
        tables = []
        for _ in cache.groups:
            tables.append(list(range(used, used + blocks)))
            used += blocks
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        length = context if goes_on else context + new
        tokens = [(i * 7919 + place) % engine.scheduler.config.vocab_size for i in range(length)]
        starts.append(RowStart(place, tokens, length, sampling, 0, None, tables))
    none = cache.no_blocks
    step = [ScheduledRow(place, context, new, True, none) for place, (new, context) in enumerate(rows)]
    if not goes_on:
        return [StepPlan(0, starts, step)]
    before = [ScheduledRow(place, context - 1, 1, True, none) for place, (_, context) in enumerate(rows)]
    return [StepPlan(0, starts, before), StepPlan(1, [], step)]


class _Timed(Executor):
    """An executor that knows how long its last step took."""

    def __init__(self, inner: Executor, clock: Callable[[], float]) -> None:
        self.depth = inner.depth
        self.last_s = 0.0
        self._inner, self._clock = inner, clock

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        began = self._clock()
        future = self._inner.submit(plan)
        self.last_s = self._clock() - began
        return future

    def close(self) -> None:
        self._inner.close()


async def measure_loop(engine: Engine, clock: Callable[[], float]) -> tuple[float, float]:
    """What planning and committing take: seconds of a step, and of each row of it."""
    timed = _Timed(engine.executor, clock)
    beside = Engine(engine.scheduler, timed)
    medians = []
    for batch in LOOP_BATCHES:
        for i in range(batch):
            prompt = [(i * 31 + j) % engine.scheduler.config.vocab_size for j in range(LOOP_TOKENS)]
            sampling = SamplingParams(max_tokens=LOOP_TOKENS, temperature=0.0, ignore_eos=True)
            beside.add(GenerateRequest(request_id=f"calibrate-{batch}-{i}", prompt=prompt, sampling=sampling))
        taken = []
        while beside.has_work:
            began = clock()
            await beside.step()
            if beside.last_step is not None and beside.last_step[0].tokens == batch:
                taken.append(clock() - began - timed.last_s)
            await asyncio.sleep(0)
        medians.append(statistics.median(taken))
    few, many = LOOP_BATCHES
    row_s = max(0.0, (medians[1] - medians[0]) / (many - few))
    return max(0.0, medians[0] - few * row_s), row_s
