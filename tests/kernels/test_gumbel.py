"""The noise of sampling: the same from both implementations, and distributed as it claims."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.kernels import gumbel

IDS = np.arange(50_000)
needs_native = pytest.mark.skipif(
    importlib.util.find_spec("headrace._native") is None, reason="the native kernels are not built"
)


def _kolmogorov_smirnov(sample: NDArray[np.float64], cdf: NDArray[np.float64]) -> float:
    """sqrt(n) times the greatest distance between the sample's distribution and cdf of the sorted sample."""
    n = sample.size
    above = np.arange(1, n + 1) / n - cdf
    below = cdf - np.arange(n) / n
    return float(np.sqrt(n) * max(above.max(), below.max()))


@needs_native
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 0), (-5, 7), (2**64 - 1, 2**32 - 1)])
def test_both_implementations_agree(seed: int, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace import _native

    ids = np.concatenate([IDS, [2**32 - 1]]).astype(np.uint32)
    uniforms = np.empty(ids.size)
    _native.uniform(seed % 2**64, position, ids.ctypes.data, ids.size, uniforms.ctypes.data)
    assert np.array_equal(uniforms, gumbel.uniforms(seed, position, ids))
    native = gumbel.gumbel_noise(seed, position, ids)
    monkeypatch.setattr(gumbel, "_NATIVE", False)
    np.testing.assert_allclose(native, gumbel.gumbel_noise(seed, position, ids), rtol=0, atol=1e-12)


def test_a_tokens_noise_is_its_own() -> None:
    """Whatever other tokens are asked for, in whatever order and however many."""
    noise = gumbel.gumbel_noise(3, 9, IDS)
    chosen = np.array([40_000, 7, 8, 7, 123])
    assert np.array_equal(gumbel.gumbel_noise(3, 9, chosen), noise[chosen])
    assert gumbel.gumbel_noise(3, 9, chosen[:0]).shape == (0,)
    assert np.array_equal(gumbel.gumbel_noise(3 + 2**64, 9, IDS), noise)
    for other in (gumbel.gumbel_noise(4, 9, IDS), gumbel.gumbel_noise(3, 10, IDS)):
        assert not np.isin(other, noise).any()


def test_the_noise_is_gumbel_over_tokens_positions_and_seeds() -> None:
    one = np.array([17])
    samples = {
        "tokens": gumbel.gumbel_noise(11, 5, IDS),
        "positions": np.concatenate([gumbel.gumbel_noise(11, p, one) for p in range(20_000)]),
        "seeds": np.concatenate([gumbel.gumbel_noise(s, 5, one) for s in range(20_000)]),
    }
    for over, sample in samples.items():
        ordered = np.sort(sample)
        # 1.95 is exceeded by chance once in a thousand samples; these are fixed.
        assert _kolmogorov_smirnov(ordered, np.exp(-np.exp(-ordered))) < 1.95, over


def test_neighbours_are_independent() -> None:
    """Correlations of uniforms between next tokens, positions and seeds, within four standard errors of 0."""
    grid = np.stack([gumbel.uniforms(2, p, IDS[:400]) for p in range(400)])
    seeds = np.stack([gumbel.uniforms(s, 2, IDS[:400]) for s in range(400)])
    pairs = {
        "tokens": (grid[:, :-1], grid[:, 1:]),
        "positions": (grid[:-1], grid[1:]),
        "diagonal": (grid[:-1, :-1], grid[1:, 1:]),
        "seeds": (seeds[:-1], seeds[1:]),
        "seed and position": (seeds[1:, :], grid[1:, :]),
    }
    for between, (a, b) in pairs.items():
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size), between
        # The lowest bit that is drawn and the highest are as even as a fair coin.
        assert abs((a < 0.5).mean() - 0.5) < 4 * 0.5 / np.sqrt(a.size), between
        low = (a * 2**52).astype(np.int64) & 1
        assert abs(low.mean() - 0.5) < 4 * 0.5 / np.sqrt(a.size), between


def test_the_largest_noisy_logit_samples_from_the_softmax() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    ids, draws = np.arange(4), 20_000
    chosen = [int(np.argmax(logits + gumbel.gumbel_noise(77, p, ids))) for p in range(draws)]
    observed = np.bincount(chosen, minlength=4)
    expected = draws * np.exp(logits)
    # The 99.9th percentile of chi-square with 3 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 16.27
