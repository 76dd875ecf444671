"""Gumbel noise that is a function of (seed, position, token id) and of nothing else.

Adding it to logits and taking the largest samples from their softmax (Gumbel-max), so a token drawn with a
seed is the same whatever was drawn before it or beside it. It knows nothing of logits and requests.

Seed and position choose a SplitMix64 stream (Steele, Lea, Flood 2014); a token's noise comes from the output
at its id: the upper 52 bits and a half make a uniform variate that is never 0 or 1, exact in float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_POSITION = 0xD1342543DE82EF95
_MASK = (1 << 64) - 1

_NATIVE = importlib.util.find_spec("headrace._native") is not None
if _NATIVE:
    from headrace import _native


def gumbel_noise(seed: int, position: int, token_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Standard Gumbel variates of the tokens, same shape as token_ids.

    seed counts modulo 2^64; position and ids are below 2^32. With the compiled module the logarithms are its
    own, without it numpy's: they agree to about 1e-15.
    """
    if not _NATIVE:
        return -np.log(-np.log(uniforms(seed, position, token_ids)))
    ids = np.ascontiguousarray(token_ids, dtype=np.uint32)
    noise = np.empty(ids.shape)
    _native.gumbel(seed & _MASK, position, ids.ctypes.data, ids.size, noise.ctypes.data)
    return noise


def choose_tokens(
    rows: Sequence[npt.NDArray[np.float32]],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int] | None:
    """For each row of logits, all of one length, the index whose scaled value plus noise is largest.

    Scaled is (logits - their maximum) / temperature; without noise where the temperature is 0, and of equal
    ones the first. -1 where a row has no finite maximum. None without the compiled module, which does this.
    """
    if not _NATIVE:
        return None
    addresses = np.array([row.ctypes.data for row in rows], np.uint64)
    heat = np.array(temperatures, np.float32)
    words = np.array([seed & _MASK for seed in seeds], np.uint64)
    places = np.array(positions, np.uint32)
    tokens = np.empty(len(rows), np.int64)
    _native.choose(
        addresses.ctypes.data,
        heat.ctypes.data,
        words.ctypes.data,
        places.ctypes.data,
        len(rows),
        rows[0].size,
        tokens.ctypes.data,
    )
    return tokens.tolist()


def uniforms(seed: int, position: int, token_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The variates in (0, 1) behind the noise: odd multiples of 2^-53."""
    stream = _mix(_mix((seed + _GOLDEN) & _MASK) ^ ((position + 1) * _POSITION & _MASK))
    z = np.uint64(stream) + (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)) * np.uint64(2) + np.uint64(1)).astype(np.float64) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
