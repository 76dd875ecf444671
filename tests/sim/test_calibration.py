"""Fitting rates to measured steps, measuring an engine's steps, and the file between both."""

from __future__ import annotations

import asyncio
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from headrace.engine import SchedulerConfig
from headrace.sim.cost import MODELS, Rates, StepCost
from headrace.sim.cost.calibration import READS, Calibration, grid, measure, measure_loop, split
from headrace.sim.cost.fit import FitError, MeasuredStep, errors, fit
from headrace.sim.hash_executor import hash_engine

SHAPE = MODELS["smollm2-135m"]
TRUE = Rates(
    linear_flops_per_s=4e11,
    attention_flops_per_s=1.5e11,
    bytes_per_s=3e10,
    kv_bytes_per_s=9e9,
    step_s=1e-3,
    row_s=2e-5,
)
GRID = grid(8192, 64, 512, 40_000)


def measured(noise: float, seed: int = 0, rates: Rates = TRUE) -> list[MeasuredStep]:
    chance, cost = random.Random(seed), StepCost(SHAPE, rates)
    return [MeasuredStep(rows, cost.seconds(rows) * (1 + chance.uniform(-noise, noise))) for rows in GRID]


@pytest.mark.parametrize("overlap", [0.0, 0.35, 1.0])
def test_exact_times_give_back_the_rates(overlap: float) -> None:
    true = replace(TRUE, overlap=overlap)
    found = fit(SHAPE, measured(0.0, rates=true), TRUE.bytes_per_s)
    for field in fields(Rates):
        assert getattr(found, field.name) == pytest.approx(getattr(true, field.name), rel=1e-6), field.name


def test_the_time_of_reading_weights_is_not_taken_for_that_of_a_step() -> None:
    """Steps of an engine that reads and multiplies one after the other look the same with any share of both,
    so that rate is told, not fitted: a model of many more weights is read at it."""
    rates = replace(TRUE, overlap=0.0, bytes_per_s=1.5e10, step_s=2e-3)
    fitted, held = split(measured(0.03, rates=rates))
    found = fit(SHAPE, fitted, 1.5e10)
    assert errors(StepCost(SHAPE, found), held).mean < 0.03
    assert found.step_s == pytest.approx(2e-3, rel=0.3)
    large = MODELS["llama-8b"]
    told, true = (StepCost(large, each).seconds([(1, 100)]) for each in (found, rates))
    assert told == pytest.approx(true, rel=0.02)
    with pytest.raises(ValueError, match="memory is read at inf"):
        fit(SHAPE, fitted, float("inf"))


def test_what_no_step_shows_is_as_fast_as_can_be() -> None:
    # Without prompts no step is bound by the arithmetic of attention.
    decodes = [step for step in measured(0.0) if all(new == 1 for new, _ in step.rows)]
    found = fit(SHAPE, decodes, TRUE.bytes_per_s)
    assert found.attention_flops_per_s > 1e15
    assert found.kv_bytes_per_s == pytest.approx(TRUE.kv_bytes_per_s, rel=0.05)
    assert errors(StepCost(SHAPE, found), decodes).most < 0.05


def test_noise_is_told_on_steps_that_were_not_fitted() -> None:
    fitted, held = split(measured(0.1))
    assert len(held) >= len(GRID) // 3
    assert not set(fitted) & set(held)
    cost = StepCost(SHAPE, fit(SHAPE, fitted, TRUE.bytes_per_s))
    found = errors(cost, held)
    assert 0.02 < found.mean < 0.1
    assert found.median <= found.most < 0.25
    assert cost.rates.linear_flops_per_s == pytest.approx(TRUE.linear_flops_per_s, rel=0.1)
    assert cost.rates.bytes_per_s == TRUE.bytes_per_s


def test_rates_are_rates_whatever_was_measured() -> None:
    chance = random.Random(3)
    for _ in range(10):  # times that no roofline explains
        found = fit(SHAPE, [MeasuredStep(rows, chance.uniform(1e-4, 1e-1)) for rows in GRID], 3e10)
        assert found.linear_flops_per_s > 0
        assert found.step_s >= 0
    with pytest.raises(ValueError, match="4 steps were measured"):
        fit(SHAPE, measured(0.0)[:4], 3e10)


@pytest.mark.parametrize(
    "limits", [(64, 64, 512, 1000), (256, 8, 256, 2000), (1024, 64, 512, 9000), (8192, 64, 512, 40_000)]
)
def test_the_grid_keeps_to_the_limits_of_the_engine(limits: tuple[int, int, int, int]) -> None:
    max_model_len, max_rows, max_tokens, kv_tokens = limits
    steps = grid(*limits)
    fitted, held = split([MeasuredStep(rows, 1.0) for rows in steps])
    assert len(fitted) >= 6 and held
    assert any(len(rows) == 1 and rows[0][0] > 1 for rows in steps)
    assert any(len(rows) > 1 and all(new == 1 for new, _ in rows) for rows in steps)
    for rows in steps:
        assert len(rows) <= max_rows
        assert sum(new for new, _ in rows) <= max_tokens
        assert sum(new + context for new, context in rows) <= kv_tokens
        assert max(new + context for new, context in rows) < max_model_len


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (
            (32, 64, 512, 1000),
            "the longest sequence is 32 tokens, .* at least 64 are needed, so raise --max-m",
        ),
        ((256, 64, 512, 20), "only 2 kinds of steps fit into 20 tokens of KV cache"),
        ((256, 64, 512, -300), "only 0 kinds of steps"),
    ],
)
def test_an_engine_too_small_to_measure_is_told_so(limits: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grid(*limits)


class Clock:
    """One that is read twice a step, and says that each took as long as the script has it."""

    def __init__(self, script: list[float]) -> None:
        self.now, self.script, self.reads = 0.0, script, 0

    def __call__(self) -> float:
        if self.reads % 2:
            self.now += self.script[self.reads // 2]
        self.reads += 1
        return self.now


def test_a_step_counts_as_the_median_of_its_turns() -> None:
    # The hash executor refuses plans that no engine could be given.
    config = SchedulerConfig(max_model_len=500, vocab_size=1000, max_num_seqs=8, max_num_batched_tokens=128)
    engine = hash_engine(config, num_blocks=400, block_size=4)
    steps = [((1, 20), (1, 33)), ((64, 0),), ((30, 16), (1, 40))]
    turns = [
        [*[100.0, 100.0, 100.0], *[900.0] * READS],
        [*[3.0, 5.0, 7.0], *[4.0] * READS],
        [*[2.0, 50.0, 8.0], *[4.0] * READS],
        [*[9.0, 4.0, 70.0], *[800.0] * READS],
    ]
    clock = Clock([seconds for turn in turns for seconds in turn])
    heard: list[int] = []
    found, rate = asyncio.run(measure(engine, steps, 3, clock, lambda: 100, lambda: heard.append(1)))
    assert rate == 100 / 4.0
    assert found == [MeasuredStep(rows, median) for rows, median in zip(steps, (3.0, 5.0, 8.0), strict=True)]
    assert len(heard) == 12


def test_the_loop_is_measured_beside_the_executor() -> None:
    config = SchedulerConfig(max_model_len=500, vocab_size=1000, max_num_seqs=8, max_num_batched_tokens=256)
    engine = hash_engine(config, num_blocks=400, block_size=4)
    ticks = iter(range(10**6))

    async def run() -> tuple[float, float]:
        return await measure_loop(engine, lambda: float(next(ticks)))

    # Of four readings a step the executor's lie between the outer two: 3 ticks, of which 1 is its own.
    assert asyncio.run(run()) == (2.0, 0.0)
    assert engine.scheduler.is_empty


def test_what_was_found_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    error = FitError(3, 0.1, 0.1, 0.2)
    found = Calibration(machine="here", shape=SHAPE, rates=TRUE, fitted=error, held_out=error, longest=9)
    found.write(path)
    assert Calibration.read(path) == found
    path.write_text(path.read_text().replace('"step_s"', '"stop_s"'))
    with pytest.raises(ValueError, match=r"found.json is no file of headrace calibrate.*step_s"):
        Calibration.read(path)
    Calibration(
        format=99, machine="", shape=SHAPE, rates=TRUE, fitted=error, held_out=error, longest=9
    ).write(path)
    with pytest.raises(ValueError, match="has format 99"):
        Calibration.read(path)
