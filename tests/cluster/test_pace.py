"""A worker's pace: the fit finds the law behind reported steps, and predictions follow from it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from members import member, step_stats

from headrace.cluster import prediction
from headrace.cluster.facts import Fact
from headrace.cluster.pace import FIRST_BASE_S, MEMORY
from headrace.cluster.placement import every
from headrace.protocol.messages import SequenceTimes, StepStats


class Watched:
    """One worker, and what is predicted for it."""

    def __init__(self, **engine: Any) -> None:
        self.member = member("w", **engine)
        self.facts = every([self.member]).facts

    def stepped(self, stats: StepStats, now: float) -> None:
        self.member.told(stats, now)
        self.facts[0] = self.member.facts

    def ended(self, times: SequenceTimes) -> None:
        self.member.pace.ended(times)
        self.facts[0] = self.member.facts

    def step_s(self, tokens: float, held: float) -> float:
        return float(prediction.step_s(self.facts, tokens, held)[0])

    def ttft_s(self, tokens: float, *, open_samples: int) -> float:
        self.facts[0, Fact.OPEN_SAMPLES] = open_samples
        return float(prediction.ttft_s(self.facts, np.array([tokens]))[0])

    def tpot_s(self, context: float, *, ttft_s: float, open_samples: int) -> float:
        self.facts[0, Fact.OPEN_SAMPLES] = open_samples
        return float(prediction.tpot_s(self.facts, context, np.array([ttft_s]))[0])

    def busy(self, now: float) -> float:
        return float(prediction.busy(self.facts, now)[0])


def step(tokens: int, held: int, step_s: float, *, running: int = 1, sampled: int = 0) -> StepStats:
    return step_stats(
        tokens=tokens, held_tokens=held, step_s=step_s, running=running, sampled=sampled, rows=1
    )


@settings(max_examples=50, deadline=None)
@given(
    base=st.floats(1e-3, 0.05),
    per_token=st.floats(1e-6, 1e-3),
    per_held=st.floats(0, 1e-6),
    seed=st.integers(0),
)
def test_the_law_behind_the_steps_is_found(base: float, per_token: float, per_held: float, seed: int) -> None:
    chance, pace = random.Random(seed), Watched()
    for _ in range(400):
        tokens, held = chance.randrange(1, 2000), chance.randrange(0, 200_000)
        pace.stepped(step(tokens, held, base + per_token * tokens + per_held * held), 0.0)
    for tokens, held in ((1, 0), (500, 50_000), (2000, 200_000)):
        expected = base + per_token * tokens + per_held * held
        assert pace.step_s(tokens, held) == pytest.approx(expected, rel=0.02)


def test_the_fit_is_that_of_weighted_least_squares() -> None:
    """Against NumPy's solver, on noise that no law explains."""
    chance, pace = random.Random(1), Watched()
    rows, seconds = [], []
    for _ in range(63):
        tokens, held = chance.randrange(1, 2000), chance.randrange(0, 200_000)
        rows.append((1.0, tokens, held))
        seconds.append(0.02 + 2e-5 * tokens + 1e-7 * held + chance.random() * 0.01)
        pace.stepped(step(tokens, held, seconds[-1]), 0.0)
    weight = np.sqrt(MEMORY ** np.arange(62, -1, -1))
    fit, *_ = np.linalg.lstsq(np.array(rows) * weight[:, None], np.array(seconds) * weight)
    assert pace.step_s(700, 90_000) == pytest.approx(float(fit @ [1, 700, 90_000]), rel=1e-3)


def test_no_coefficient_is_negative_whatever_was_measured() -> None:
    pace = Watched()
    for tokens in range(1, 100):
        pace.stepped(step(tokens, 100_000 - 1000 * tokens, 0.02 - 1e-4 * tokens), 0.0)
    assert pace.step_s(10_000, 0) >= pace.step_s(1, 0) >= 0.0
    assert pace.step_s(1, 10_000_000) >= pace.step_s(1, 0)


def test_steps_of_one_kind_only_still_give_an_answer() -> None:
    pace = Watched()
    for _ in range(100):
        pace.stepped(step(4, 1000, 0.03), 0.0)
    assert pace.step_s(4, 1000) == pytest.approx(0.03, rel=0.01)


def test_the_first_token_waits_for_full_steps_and_for_a_row() -> None:
    pace = Watched(max_num_seqs=2, max_num_batched_tokens=100)
    for tokens in range(1, 200):
        pace.stepped(step(tokens % 100 + 1, 0, 0.01 + 1e-4 * (tokens % 100 + 1), running=0), 0.0)
    assert pace.ttft_s(100, open_samples=0) == pytest.approx(0.02, rel=0.02)
    assert pace.ttft_s(250, open_samples=0) == pytest.approx(0.03 + 0.025, rel=0.02)
    for _ in range(200):
        pace.ended(SequenceTimes(0.0, 0.0, 4.0))
    waits = pace.ttft_s(100, open_samples=2) - pace.ttft_s(100, open_samples=0)
    assert waits == pytest.approx(4.0 / 2, rel=0.02)


def test_later_tokens_count_those_that_will_decode_then_not_those_that_decode_now() -> None:
    pace = Watched(max_num_seqs=64)
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
    pace, now = Watched(), 0.0
    for _ in range(2000):
        now += 0.1
        pace.stepped(step(1, 0, 0.05), now)
    assert pace.busy(now) == pytest.approx(0.5, rel=0.02)
    assert pace.busy(now + 60) < 0.01


def test_a_worker_that_has_done_nothing_is_taken_for_an_ordinary_one() -> None:
    assert Watched().ttft_s(1, open_samples=0) == pytest.approx(FIRST_BASE_S, rel=0.1)
