"""Int8 weights: native against torch, bit for bit and on every level, and what codes keep of their values."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from headrace.kernels.base import Activation
from headrace.kernels.int8 import MOST_ACTIVATION, MOST_INPUTS, MOST_WEIGHT, quantize_rows
from headrace.kernels.reference import TorchKernels

native = pytest.importorskip("headrace._native", reason="the native kernels were not built")
from headrace.kernels.native import NativeKernels, multiplies_bfloat16  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
NATIVE = {dtype: NativeKernels(dtype=dtype, quantization="int8", threads=2) for dtype in (F32, BF16)}
TORCH = {dtype: TorchKernels(dtype=dtype, quantization="int8") for dtype in (F32, BF16)}
# Around the tiles of rows (1, 4, 6, 8, 16, 256), columns (32) and inputs (4, 64).
SHAPES = [
    (1, 64, 32),
    (3, 100, 33),
    (5, 67, 70),
    (13, 129, 31),
    (17, 576, 96),
    (33, 3, 64),
    (70, 1536, 65),
    (300, 64, 40),
]


def values(*shape: int) -> Tensor:
    """Rows whose magnitudes differ, some far out, as in a real model."""
    x = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < 0.01, 20 * x, x) * torch.rand(shape[0], 1) * 3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)
    native.set_threads(2)


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear_has_the_bits_of_the_reference(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, with_bias: bool
) -> None:
    x, weight = values(rows, inputs).to(dtype), values(outputs, inputs)
    bias = torch.randn(outputs) if with_bias else None
    ours, theirs = NATIVE[dtype].pack_linear(weight, bias), TORCH[dtype].pack_linear(weight, bias)
    for out_dtype in (F32, BF16, None):
        expected = TORCH[dtype].linear(x, theirs, out_dtype=out_dtype)
        assert torch.equal(NATIVE[dtype].linear(x, ours, out_dtype=out_dtype), expected), out_dtype
    total = torch.randn(rows, outputs)
    expected = TORCH[dtype].linear(x, theirs, add_to=total.clone())
    assert torch.equal(NATIVE[dtype].linear(x, ours, add_to=total), expected)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inputs", "width"), [(130, 97), (64, 16), (33, 5)])
def test_gated_linear(dtype: torch.dtype, activation: Activation, inputs: int, width: int) -> None:
    x, weight, bias = values(70, inputs).to(dtype), values(2 * width, inputs) / 8, torch.randn(2 * width)
    gate, up = TORCH[dtype].linear(x, TORCH[dtype].pack_linear(weight, bias)).double().chunk(2, -1)
    cubic = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = gate * torch.sigmoid(gate if activation == "silu" else cubic) * up
    packed = NATIVE[dtype].pack_gated(weight, bias)
    found = NATIVE[dtype].gated_linear(x, packed, activation)
    limit = 2e-5 if dtype is F32 else 2**-8
    assert ((found - expected).abs() <= limit * expected.abs() + 1e-30).all()
    for rows in (1, 4, 5, 17, 33):
        assert torch.equal(NATIVE[dtype].gated_linear(x[:rows], packed, activation), found[:rows]), rows


@DTYPES
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    kernels = NATIVE[dtype]
    x, packed = values(600, 200).to(dtype), kernels.pack_linear(values(150, 200), torch.randn(150))
    native.set_threads(1)
    alone = torch.cat([kernels.linear(x[i : i + 1], packed, out_dtype=F32) for i in range(70)])
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for count in [*range(1, 71), 255, 289, 600]:
            together = kernels.linear(x[:count], packed, out_dtype=F32)
            assert torch.equal(together[:70], alone[:count]), (threads, count)


@DTYPES
def test_linear_takes_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    kernels = NATIVE[dtype]
    wide, packed = values(9, 100).to(dtype), kernels.pack_linear(values(40, 64), None)
    rows = wide[::2, 3:67]
    assert torch.equal(kernels.linear(rows, packed), kernels.linear(rows.contiguous(), packed))
    assert kernels.linear(wide[:0, :64], packed).shape == (0, 40)


def test_the_largest_codes_do_not_overflow() -> None:
    """The largest products: saturating 16-bit sums, int32 sums of both bytes or a wrong offset lose them."""
    inputs = 4096
    x = torch.ones(3, inputs) * torch.tensor([[1.0], [-1.0], [1.0]])
    x[2, ::2] = -1.0
    x[1, 1:] = -32384 / 32512  # whose low byte is -128
    weight = torch.ones(64, inputs)
    weight[1], weight[2, ::2] = -1.0, -1.0
    kernels = NATIVE[F32]
    found = kernels.linear(x, kernels.pack_linear(weight, None))
    assert torch.allclose(found.double(), x.double() @ weight.double().T, rtol=1e-6)


@pytest.mark.parametrize("most", [MOST_WEIGHT, MOST_ACTIVATION])
def test_codes_are_within_half_a_step(most: int) -> None:
    x = values(50, 333)
    x[3] = 0.0
    codes, scales = quantize_rows(x, most)
    assert (codes.abs().amax(1) == most).sum() == 49
    assert ((codes * scales[:, None] - x).abs() <= scales[:, None] * 0.501).all()
    assert scales[3] == 0
    assert not codes[3].any()


@DTYPES
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    kernels = NATIVE[dtype]
    weight = torch.randn(33, 70)
    packed = kernels.pack_linear(weight, None)
    x = torch.randn(8, 70).to(dtype)
    x[1, 5], x[3, 69], x[6, 0] = torch.nan, torch.inf, -torch.inf
    for rows in (x, x[:4]):  # both ways to multiply
        finite = kernels.linear(rows, packed, out_dtype=F32).isfinite()
        assert finite.all(1).tolist() == [i not in (1, 3, 6) for i in range(len(rows))]
        assert not finite[1].any()
        assert not finite[3].any()
    weight[7, 3] = torch.nan
    broken = kernels.linear(x[:1], kernels.pack_linear(weight, None), out_dtype=F32)
    assert broken.isnan()[0].nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("kernels", [NATIVE[F32], TORCH[F32]], ids=["native", "torch"])
def test_a_layer_whose_sums_could_overflow_is_refused(kernels: NativeKernels | TorchKernels) -> None:
    with pytest.raises(ValueError, match=f"exact up to {MOST_INPUTS}"):
        kernels.pack_linear(torch.zeros(1, MOST_INPUTS + 1), None)


def test_numerics_name_the_quantisation() -> None:
    for quantised, plain in (
        (NATIVE[BF16], NativeKernels(dtype=BF16)),
        (TORCH[BF16], TorchKernels(dtype=BF16)),
    ):
        assert quantised.numerics == f"{plain.numerics}-int8"


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_level_has_the_bits_of_the_reference(level: str) -> None:
    if "HEADRACE_NATIVE_ISA" in os.environ:
        pytest.skip("HEADRACE_NATIVE_ISA already forces a level")
    if level == "avx512" and not multiplies_bfloat16():
        pytest.skip("this processor has no AVX512 with VNNI and BF16")
    if level == "avx2" and native.level() == "portable":
        pytest.skip("this processor has no AVX2")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "HEADRACE_NATIVE_ISA": level},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-2000:]
