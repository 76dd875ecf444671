"""Rotary position tables: from a model's rotary settings to cosines and sines for every position.

Computed in float32 in the order that the reference implementations use, since the rounding of an angle
grows with the position and models are judged against those. Dynamic NTK scaling depends on a length;
it is resolved once, for the length that is served, so that cached keys stay valid while a sequence
grows and results do not depend on how a prompt was split into chunks. A sequence therefore gets the
frequencies that a sequence of `max_model_len` tokens would get.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.models.config import (
    DefaultRotary,
    DynamicRotary,
    LinearRotary,
    Llama3Rotary,
    Rotary,
    YarnRotary,
)


def cos_sin_table(rotary: Rotary, head_dim: int, max_model_len: int) -> Tensor:
    """[max_model_len, head_dim] float32: cosines in the first half of a row, sines in the second."""
    frequencies, scale = _frequencies(rotary, head_dim, max_model_len)
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def _frequencies(rotary: Rotary, head_dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, [head_dim / 2], and the factor on cos and sin."""
    match rotary:
        case LinearRotary():
            return _base_frequencies(rotary.theta, head_dim) / rotary.factor, 1.0
        case DynamicRotary():
            return _dynamic(rotary, head_dim, max_model_len), 1.0
        case Llama3Rotary():
            return _llama3(rotary, head_dim), 1.0
        case YarnRotary():
            return _yarn(rotary, head_dim), rotary.attention_factor
        case DefaultRotary():
            return _base_frequencies(rotary.theta, head_dim), 1.0


def _base_frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


def _dynamic(rotary: DynamicRotary, head_dim: int, max_model_len: int) -> Tensor:
    """The base grows so that the lowest frequency is interpolated and the highest is kept."""
    stretch = max(1.0, max_model_len / rotary.original_max_positions)
    growth = (rotary.factor * stretch - (rotary.factor - 1)) ** (head_dim / (head_dim - 2))
    return _base_frequencies(rotary.theta * growth, head_dim)


def _llama3(rotary: Llama3Rotary, head_dim: int) -> Tensor:
    frequencies = _base_frequencies(rotary.theta, head_dim)
    rotations = rotary.original_max_positions * frequencies / (2 * math.pi)
    ramp = (rotations - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    kept = ramp.clamp(0, 1)
    return (1 - kept) * frequencies / rotary.factor + kept * frequencies


def _yarn(rotary: YarnRotary, head_dim: int) -> Tensor:
    """Dimensions that turn often keep their frequency, those that turn rarely are interpolated."""

    def dimension_of(rotations: float) -> float:
        """The pair of dimensions that makes so many rotations over the original length."""
        span = rotary.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rotary.theta))

    low, high = dimension_of(rotary.beta_fast), dimension_of(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = _base_frequencies(rotary.theta, head_dim)
    return frequencies / rotary.factor * interpolated + frequencies * (1 - interpolated)
