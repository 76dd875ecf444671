"""A worker's pace: the fit finds the law behind reported steps, and predictions follow from it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.pace import FIRST_BASE_S, MEMORY, Pace
from headrace.protocol.messages import EngineInfo, SequenceTimes, StepStats


def engine(**fields: int) -> EngineInfo:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 100, **fields}
    return EngineInfo(
        model="m",
        revision="r",
        numerics="n",
        dtype="bfloat16",
        batch_invariant=True,
        max_model_len=1000,
        vocab_size=100,
        max_waiting=100,
        block_size=16,
        num_blocks=100,
        block_bytes=10,
        weight_bytes=10,
        prefix_caching=True,
        kv_layout="l",
        threads=1,
        pid=1,
        **sizes,
    )


def step(tokens: int, held: int, step_s: float, *, running: int = 1, sampled: int = 0) -> StepStats:
    return StepStats(
        step=1,
        tokens=tokens,
        sampled=sampled,
        rows=1,
        step_s=step_s,
        kernel_s=step_s,
        running=running,
        waiting=0,
        blocks_free=0,
        blocks_cached=0,
        blocks_held=0,
        blocks_leased=0,
        blocks_quarantined=0,
        held_tokens=held,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        evictions=0,
    )


@settings(max_examples=50, deadline=None)
@given(
    base=st.floats(1e-3, 0.05),
    per_token=st.floats(1e-6, 1e-3),
    per_held=st.floats(0, 1e-6),
    seed=st.integers(0),
)
def test_the_law_behind_the_steps_is_found(base: float, per_token: float, per_held: float, seed: int) -> None:
    chance, pace = random.Random(seed), Pace(engine())
    for _ in range(400):
        tokens, held = chance.randrange(1, 2000), chance.randrange(0, 200_000)
        pace.stepped(step(tokens, held, base + per_token * tokens + per_held * held), 0.0)
    for tokens, held in ((1, 0), (500, 50_000), (2000, 200_000)):
        expected = base + per_token * tokens + per_held * held
        assert pace.step_s(tokens, held) == pytest.approx(expected, rel=0.02)


def test_the_fit_is_that_of_weighted_least_squares() -> None:
    """Against NumPy's solver, on noise that no law explains."""
    chance, pace = random.Random(1), Pace(engine())
    rows, seconds = [], []
    for _ in range(64):
        tokens, held = chance.randrange(1, 2000), chance.randrange(0, 200_000)
        rows.append((1.0, tokens, held))
        seconds.append(0.02 + 2e-5 * tokens + 1e-7 * held + chance.random() * 0.01)
        pace.stepped(step(tokens, held, seconds[-1]), 0.0)
    weight = np.sqrt(MEMORY ** np.arange(63, -1, -1))
    fit, *_ = np.linalg.lstsq(np.array(rows) * weight[:, None], np.array(seconds) * weight)
    assert pace.step_s(700, 90_000) == pytest.approx(float(fit @ [1, 700, 90_000]), rel=1e-3)


def test_no_coefficient_is_negative_whatever_was_measured() -> None:
    pace = Pace(engine())
    for tokens in range(1, 100):
        pace.stepped(step(tokens, 100_000 - 1000 * tokens, 0.02 - 1e-4 * tokens), 0.0)
    assert pace.step_s(10_000, 0) >= pace.step_s(1, 0) >= 0.0
    assert pace.step_s(1, 10_000_000) >= pace.step_s(1, 0)


def test_steps_of_one_kind_only_still_give_an_answer() -> None:
    pace = Pace(engine())
    for _ in range(100):
        pace.stepped(step(4, 1000, 0.03), 0.0)
    assert pace.step_s(4, 1000) == pytest.approx(0.03, rel=0.01)


def test_the_first_token_waits_for_full_steps_and_for_a_row() -> None:
    pace = Pace(engine(max_num_seqs=2, max_num_batched_tokens=100))
    for tokens in range(1, 200):
        pace.stepped(step(tokens % 100 + 1, 0, 0.01 + 1e-4 * (tokens % 100 + 1), running=0), 0.0)
    assert pace.ttft_s(100, open_samples=0) == pytest.approx(0.02, rel=0.02)
    assert pace.ttft_s(250, open_samples=0) == pytest.approx(0.03 + 0.025, rel=0.02)
    for _ in range(200):
        pace.ended(SequenceTimes(0.0, 0.0, 4.0))
    waits = pace.ttft_s(100, open_samples=2) - pace.ttft_s(100, open_samples=0)
    assert waits == pytest.approx(4.0 / 2, rel=0.02)


def test_later_tokens_count_those_that_will_decode_then_not_those_that_decode_now() -> None:
    pace = Pace(engine(max_num_seqs=64))
    for n in range(400):
        rows = n % 32 + 1
        pace.stepped(step(rows, 100 * rows, 0.01 + 1e-3 * rows, running=32, sampled=rows), 0.0)
    for _ in range(200):
        pace.ended(SequenceTimes(0.0, 0.0, 1.0))
    at_once = pace.tpot_s(100, ttft_s=0.0, open_samples=32)
    later = pace.tpot_s(100, ttft_s=5.0, open_samples=32)
    crowded = pace.tpot_s(100, ttft_s=5.0, open_samples=52)
    assert later < crowded < at_once


def test_the_busy_share_fades() -> None:
    pace, now = Pace(engine()), 0.0
    for _ in range(2000):
        now += 0.1
        pace.stepped(step(1, 0, 0.05), now)
    assert pace.busy(now) == pytest.approx(0.5, rel=0.02)
    assert pace.busy(now + 60) < 0.01


def test_a_worker_that_has_done_nothing_is_taken_for_an_ordinary_one() -> None:
    assert Pace(engine()).ttft_s(1, open_samples=0) == pytest.approx(FIRST_BASE_S, rel=0.1)
