"""Arrivals against the distributions they claim, with fixed seeds and stated error rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from headrace.bench.arrivals import Rate, arrivals
from headrace.bench.errors import BenchError

COUNT = 4000


def take(rate: Rate, burstiness: float, seed: int, count: int = COUNT) -> np.ndarray:
    return np.array(list(itertools.islice(arrivals(rate, burstiness, np.random.default_rng(seed)), count)))


def kolmogorov_smirnov(values: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """The probability of so large a distance by chance (Kolmogorov's limit)."""
    ordered = np.sort(values)
    n = len(ordered)
    expected = cdf(ordered)
    distance = max(
        (np.arange(1, n + 1) / n - expected).max(), (expected - np.arange(n) / n).max()
    ) * math.sqrt(n)
    terms = range(1, 100)
    return float(min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * distance**2) for k in terms)))


def exponential(x: np.ndarray) -> np.ndarray:
    return 1 - np.exp(-x)


def erlang4(x: np.ndarray) -> np.ndarray:
    """Gamma of shape 4 and mean 1."""
    y = 4 * x
    return 1 - np.exp(-y) * (1 + y + y**2 / 2 + y**3 / 6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.5, 30.0])
def test_gaps_are_exponential_at_burstiness_one(rate: float, seed: int) -> None:
    gaps = np.diff(take(Rate.constant(rate), 1.0, seed)) * rate
    assert kolmogorov_smirnov(gaps, exponential) > 1e-4
    assert kolmogorov_smirnov(gaps * 1.15, exponential) < 1e-4, "a rate off by 15% is not seen"


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_poisson_at_burstiness_one(seed: int) -> None:
    """Counts in windows have variance equal to their mean: their dispersion is chi-squared."""
    times = take(Rate.constant(10.0), 1.0, seed)
    counts = np.histogram(times, np.arange(0.0, times[-1] - 1, 1.0))[0]
    freedom = len(counts) - 1
    dispersion = ((counts - counts.mean()) ** 2).sum() / counts.mean()
    assert abs(dispersion - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(3))
def test_gaps_are_gamma(seed: int) -> None:
    gaps = np.diff(take(Rate.constant(7.0), 4.0, seed)) * 7.0
    assert kolmogorov_smirnov(gaps, erlang4) > 1e-4
    assert kolmogorov_smirnov(gaps, exponential) < 1e-9


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
def test_burstiness_is_the_inverse_of_the_squared_variation(burstiness: float) -> None:
    gaps = np.diff(take(Rate.constant(3.0), burstiness, 11, 50_000))
    assert np.mean(gaps) == pytest.approx(1 / 3, rel=0.03)
    assert np.var(gaps) / np.mean(gaps) ** 2 == pytest.approx(1 / burstiness, rel=0.08)


def test_infinite_burstiness_ticks() -> None:
    assert take(Rate.constant(4.0), math.inf, 0, 5).tolist() == [0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("begin", "end"), [(2.0, 40.0), (40.0, 2.0), (0.01, 50.0)])
def test_a_ramp_is_poisson_in_its_own_time(begin: float, end: float) -> None:
    """By the time-rescaling theorem the expected counts at the arrivals have exponential gaps."""
    over = 2 * COUNT / (begin + end)
    times = take(Rate.ramp(begin, end, over), 1.0, 5)
    within = times[times < over]
    assert len(within) == pytest.approx(COUNT, rel=0.1)
    expected = begin * within + (end - begin) / (2 * over) * within**2
    assert kolmogorov_smirnov(np.diff(expected), exponential) > 1e-4
    assert (np.diff(times) >= 0).all()


def test_after_a_ramp_the_rate_stays() -> None:
    rate = Rate.ramp(1.0, 10.0, 2.0)
    assert rate.when(11.0) == pytest.approx(2.0)
    assert rate.when(21.0) == pytest.approx(3.0)


def test_when_inverts_the_expected_count_also_for_a_hair_of_a_slope() -> None:
    for begin, end in ((5.0, 5.0), (5.0, 5.0 + 1e-12), (5.0, 5.1), (9.0, 1.0)):
        rate = Rate.ramp(begin, end, 10.0)
        for at in (0.0, 1e-6, 3.0, 9.999):
            count = begin * at + (end - begin) / 20 * at * at
            assert rate.when(count) == pytest.approx(at, rel=1e-9, abs=1e-12)


def test_seeds_fix_arrivals() -> None:
    assert take(Rate.constant(1.0), 1.0, 3, 600).tolist() == take(Rate.constant(1.0), 1.0, 3, 600).tolist()
    assert take(Rate.constant(1.0), 1.0, 3, 600).tolist() != take(Rate.constant(1.0), 1.0, 4, 600).tolist()


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(BenchError, match="a rate must be above 0"):
        Rate.constant(rate)


@pytest.mark.parametrize("burstiness", [0.0, -1.0, math.nan])
def test_what_is_no_burstiness_is_refused(burstiness: float) -> None:
    with pytest.raises(BenchError, match="burstiness must be above 0"):
        arrivals(Rate.constant(1.0), burstiness, np.random.default_rng(0))
