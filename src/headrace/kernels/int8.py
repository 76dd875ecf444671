"""Int8 weights in plain torch: the arithmetic that `native/kernels/linear_int8.cpp` computes, bit for bit.

A weight has one scale for each output, a row of x one of its own, taken when the row comes. Codes are
symmetric and zero is exact. Those of a weight fit into a byte. Activations have a few values far out, which
would leave eight bits too coarse for the rest: their codes are two bytes, multiplied one after the other.
Sums of codes are integers, hence the same in any order and for any company of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.base import Linear

MOST_INPUTS = (2**31 - 1) // (128 * 127)
"""Products that an int32 holds whatever they are."""

MOST_WEIGHT = 127
MOST_ACTIVATION = 127 * 256
_LEAST = 1e-30


@dataclass(frozen=True, slots=True)
class TorchInt8Linear(Linear):
    """codes: [out, in] int8. scales, bias: [out] float32."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


def check_inputs(inputs: int) -> None:
    """ValueError for a layer whose sums could leave an int32."""
    if inputs > MOST_INPUTS:
        raise ValueError(
            f"a layer has {inputs} inputs; int8 sums are exact up to {MOST_INPUTS}. Run without quantization"
        )


def quantize_rows(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """x [rows, n] → codes [rows, n] int16 of at most `most`, scales [rows] float32, with x ≈ codes * scales.

    A row whose largest magnitude is below 1e-30 counts as zeros; one that holds an infinity or what is not a
    number gets a scale that is no finite number either.
    """
    x = x.to(torch.float32)
    top = x.abs().amax(dim=-1)
    tiny = top < _LEAST
    scales = torch.where(tiny, torch.zeros_like(top), top / float(most))
    # Tensor by tensor: torch computes a number over a tensor as a reciprocal, rounded twice.
    inverse = torch.where(tiny, torch.zeros_like(top), torch.full_like(top, float(most)) / top)
    return (x * inverse.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int16), scales


def pack_int8(weight: Tensor, bias: Tensor | None) -> TorchInt8Linear:
    """Quantise weight [out, in]."""
    check_inputs(weight.shape[1])
    codes, scales = quantize_rows(weight, MOST_WEIGHT)
    wide = None if bias is None else bias.to(torch.float32)
    return TorchInt8Linear(codes.to(torch.int8), scales, wide, weight.shape[1], weight.shape[0])


def multiply_int8(x: Tensor, packed: TorchInt8Linear) -> Tensor:
    """x [rows, in] → [rows, out] float32, bias included."""
    codes, scales = quantize_rows(x, MOST_ACTIVATION)
    high = (codes.to(torch.int32) + 128) >> 8
    low = codes - 256 * high
    # Integers of this size are exact in float64, whose products torch computes fast.
    weight = packed.codes.to(torch.float64)
    sums = [F.linear(half.to(torch.float64), weight).to(torch.float32) for half in (high, low)]
    result = (sums[0] * 256.0 + sums[1]) * (packed.scales * scales.unsqueeze(-1))
    return result if packed.bias is None else result + packed.bias
