"""The reference kernels against formulas in float64, and the same bits for a row whatever runs beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.kernels import Activation, AttentionSpec, KVCacheLayer
from headrace.kernels.batch import Batch
from headrace.kernels.reference import TorchKernels

FLOAT32 = TorchKernels(dtype=torch.float32)
INVARIANT = TorchKernels(dtype=torch.float32, batch_invariant=True)
BOTH = pytest.mark.parametrize("kernels", [FLOAT32, INVARIANT], ids=["free", "invariant"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for each other at operations this small only cost time


def _close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ---- linear layers, norms, activations ---------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (16, 33, 20), (37, 64, 3)])
def test_linear(kernels: TorchKernels, rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    packed = kernels.pack_linear(weight, bias)
    assert (packed.in_features, packed.out_features) == (inputs, outputs)
    expected = x.double() @ weight.double().T + bias
    _close(kernels.linear(x, packed), expected)
    total = torch.randn(rows, outputs)
    before = total.clone()
    assert kernels.linear(x, packed, add_to=total) is total
    _close(total, before + expected)


def test_linear_in_bfloat16_rounds_only_where_asked() -> None:
    kernels = TorchKernels(dtype=torch.bfloat16)
    x = torch.randn(3, 40).to(torch.bfloat16)
    weight = torch.randn(6, 40)
    packed = kernels.pack_linear(weight, None)
    exact = x.double() @ weight.to(torch.bfloat16).double().T
    assert torch.equal(kernels.linear(x, packed), exact.to(torch.bfloat16))
    _close(kernels.linear(x, packed, out_dtype=torch.float32), exact)
    total = torch.zeros(3, 6)
    kernels.linear(x, packed, add_to=total)
    _close(total, exact)


@BOTH
def test_rms_norm(kernels: TorchKernels) -> None:
    x, weight = torch.randn(5, 36), torch.rand(36)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    _close(kernels.rms_norm(x, weight, 1e-3), expected)
    total = torch.ones(5, 36)
    assert kernels.rms_norm(x, weight, 1e-3, add_to=total) is total
    _close(total, 1 + expected)


@BOTH
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear(kernels: TorchKernels, activation: Activation) -> None:
    x, weight, bias = torch.randn(4, 23), torch.randn(2 * 19, 23), torch.randn(2 * 19)
    gate_up = x.double() @ weight.double().T + bias
    gate, up = gate_up.double().chunk(2, -1)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    act = gate / (1 + (-gate).exp()) if activation == "silu" else 0.5 * gate * (1 + cubic.tanh())
    packed = kernels.pack_gated(weight, bias)
    assert (packed.in_features, packed.out_features) == (23, 19)
    _close(kernels.gated_linear(x, packed, activation), act * up)


def test_no_rows_are_no_error() -> None:
    packed = INVARIANT.pack_linear(torch.randn(4, 8), None)
    assert INVARIANT.linear(INVARIANT.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6), packed).shape == (
        0,
        4,
    )


# ---- attention ---------------------------------------------------------------------------------------


class Case:
    """Sequences of given lengths with random queries, keys and values, and one layer's constants."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 10,
        block_size: int = 7,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        width = (heads + 2 * kv_heads) * head_dim
        self.spec = AttentionSpec(heads, kv_heads, head_dim, 0.4, window, softcap)
        self.lengths = lengths
        self.block_size = block_size
        self.qkv = [torch.randn(length, width, generator=generator) for length in lengths]
        angles = torch.arange(max(lengths))[:, None] / 7.0 ** torch.arange(head_dim // 2)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        self.q_norm, self.k_norm = torch.rand(2, head_dim, generator=generator) + 0.5

    def run(
        self, kernels: TorchKernels, steps: Sequence[Mapping[int, int]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Step i computes steps[i][s] more tokens of sequence s → (output, log-sum-exp) of all its tokens.

        Pages hold NaN until they are written, and what a window has left behind is struck out of the tables.
        """
        spec = self.spec
        blocks = -(-max(self.lengths) // self.block_size)
        count = blocks * len(self.lengths)
        pages = kernels.allocate_kv(count + 2, 2, spec.kv_heads, spec.head_dim, self.block_size).fill_(
            math.nan
        )
        tables = torch.randperm(count + 2)[:count].to(torch.int32).view(-1, blocks)
        cache = KVCacheLayer(pages, 0, 1, spec.kv_heads, spec.head_dim, self.block_size)
        done = [0] * len(self.lengths)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for step in steps:
            spans = {sequence: (done[sequence], done[sequence] + new) for sequence, new in step.items()}
            batch = Batch(
                torch.zeros(sum(step.values()), dtype=torch.int32),
                torch.cat([torch.arange(*span, dtype=torch.int32) for span in spans.values()]),
                torch.tensor([0, *step.values()]).cumsum(0).to(torch.int32),
                torch.tensor([end for _, end in spans.values()], dtype=torch.int32),
                (tables[list(step)],),
            )
            qkv = torch.cat([self.qkv[sequence][slice(*span)] for sequence, span in spans.items()])
            q = kernels.rotate_and_store(
                qkv.to(kernels.dtype), batch, cache, spec, self.cos_sin, self.q_norm, self.k_norm, 1e-5
            )
            out, lse = kernels.attention(q, batch, cache, spec)
            counts = list(step.values())
            for sequence, parts in zip(
                step, zip(out.split(counts), lse.split(counts), strict=True), strict=True
            ):
                found.setdefault(sequence, []).append(parts)
                done[sequence] = spans[sequence][1]
                if spec.window is not None:
                    tables[sequence, : max(0, done[sequence] - spec.window + 1) // self.block_size] = -1
        return {
            sequence: (torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]))
            for sequence, parts in found.items()
        }

    def expected(self, sequence: int) -> tuple[Tensor, Tensor]:
        """The same by the formula, dense, in float64."""
        spec = self.spec
        heads = self.qkv[sequence].double().view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], 1)
        q, k = self._rotated(q, self.q_norm), self._rotated(k, self.k_norm)
        group = spec.heads // spec.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        position = torch.arange(len(q))
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (spec.window or math.inf))
        scores = scores.masked_fill(hidden, -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return out, scores.logsumexp(-1).T

    def _rotated(self, x: Tensor, norm: Tensor) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        half = self.spec.head_dim // 2
        pairs = torch.complex(x[..., :half], x[..., half:])
        turn = torch.complex(*self.cos_sin[: len(x)].double().chunk(2, -1))
        turned = pairs * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)


VARIANTS = {
    "plain": {},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "multi-query": {"heads": 5, "kv_heads": 1, "block_size": 16},
    "one position per block": {"block_size": 1, "window": 30},
}


@BOTH
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention(kernels: TorchKernels, variant: str) -> None:
    case = Case((70, 41, 1, 132), **VARIANTS[variant])
    steps = [{0: 50, 3: 129}, {3: 2, 1: 40, 0: 20, 2: 1}, {1: 1, 3: 1}]
    for sequence, (out, lse) in case.run(kernels, steps).items():
        expected_out, expected_lse = case.expected(sequence)
        _close(out, expected_out)
        _close(lse, expected_lse)


def test_log_sum_exp_weighs_partial_results() -> None:
    """With values of one at the newest key and zero before, the output is that key's weight exp(s - lse)."""
    case = Case((9,))
    spec = case.spec
    case.qkv[0].view(9, -1, spec.head_dim)[:, -spec.kv_heads :] = 0
    case.qkv[0].view(9, -1, spec.head_dim)[8, -spec.kv_heads :] = 1
    alone = replace(spec, window=1)
    out, lse = case.run(FLOAT32, [{0: 9}])[0]
    case.spec = alone
    _, score = case.run(FLOAT32, [{0: 9}])[0]
    weight = out[8].view(spec.heads, spec.head_dim)
    _close(weight, (score - lse)[8].exp()[:, None].expand_as(weight))


# ---- batch invariance --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_alone_and_together(dtype: torch.dtype) -> None:
    kernels = TorchKernels(dtype=dtype, batch_invariant=True)
    x = torch.randn(53, 72)
    norm = torch.rand(72)
    up = kernels.pack_gated(torch.randn(2 * 50, 72), torch.randn(2 * 50))
    down = kernels.pack_linear(torch.randn(72, 50), None)

    def block(rows: Tensor) -> Tensor:
        total = rows.clone()
        normed = kernels.rms_norm(rows, norm, 1e-6)
        gated = kernels.gated_linear(normed, up, "silu") + kernels.gated_linear(normed, up, "gelu_tanh")
        return kernels.linear(gated, down, add_to=total)

    together = block(x)
    for begin, end in [(0, 1), (1, 2), (52, 53), (7, 10), (20, 37), (30, 53)]:
        assert torch.equal(block(x[begin:end]), together[begin:end]), f"rows {begin}:{end}"


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_an_activation_that_two_threads_share_has_the_bits_of_each_row_alone(activation: Activation) -> None:
    """Torch would cut 701 rows of 61 in the middle of row 350, and round that row's elements another way."""
    kernels = TorchKernels(dtype=torch.float32, batch_invariant=True, threads=2)
    packed = kernels.pack_gated(torch.randn(2 * 61, 40), None)
    x = torch.randn(701, 40)
    together = kernels.gated_linear(x, packed, activation)
    alone = [kernels.gated_linear(row[None], packed, activation) for row in x]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_has_the_same_bits_however_it_is_cut(variant: str, dtype: torch.dtype) -> None:
    kernels = TorchKernels(dtype=dtype, batch_invariant=True)
    case = Case((150, 61), **VARIANTS[variant])
    whole = case.run(kernels, [{0: 150}])[0]
    schedules = {
        "chunks of 16 beside another": [{0: 16, 1: 7}] * 8 + [{1: 5, 0: 16}, {0: 6}],
        "chunks of 37": [{0: 37}] * 4 + [{0: 2}],
        "one by one": [{1: 61}, *[{0: 1}] * 150],
        "uneven": [{0: 1}, {0: 64}, {0: 15}, {0: 33}, {0: 37}],
    }
    for name, schedule in schedules.items():
        for ours, expected in zip(case.run(kernels, schedule)[0], whole, strict=True):
            assert torch.equal(ours, expected), name


def test_time_in_kernels_is_counted() -> None:
    kernels = TorchKernels(dtype=torch.float32)
    packed = kernels.pack_linear(torch.randn(64, 64), None)
    assert kernels.busy_s == 0
    kernels.linear(torch.randn(64, 64), packed)
    once = kernels.busy_s
    kernels.linear(torch.randn(64, 64), packed)
    assert 0 < once < kernels.busy_s


def test_numerics_name_what_decides_the_bits() -> None:
    one = TorchKernels(dtype=torch.float32, threads=1).numerics
    two = TorchKernels(dtype=torch.float32, threads=2).numerics
    assert one != two
    assert torch.backends.cpu.get_cpu_capability().lower() in one


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        TorchKernels(dtype=torch.float16)
