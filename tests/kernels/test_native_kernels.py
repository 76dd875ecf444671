"""The native kernels against formulas in float64, and their promise that rows do not influence each other.

The last test runs the others again at every instruction set that this processor has below its best.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.kernels import Activation, AttentionSpec, KVCacheLayer
from headrace.kernels.batch import Batch

native = pytest.importorskip(
    "headrace._native", reason="the native kernels are not built: no C++ compiler when headrace was installed"
)
from headrace.kernels.native import NativeKernels  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
KERNELS = {F32: NativeKernels(dtype=F32), BF16: NativeKernels(dtype=BF16)}
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
# Relative to the largest element: float32 sums, then one rounding to bfloat16 (2^-9) of the result.
TOLERANCE = {F32: 2e-6, BF16: 2.5e-3}


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    torch.manual_seed(0)
    before, torch_before = native.threads(), torch.get_num_threads()
    native.set_threads(2)
    torch.set_num_threads(1)
    yield
    native.set_threads(before)
    torch.set_num_threads(torch_before)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    expected = expected.double()
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


# ---- linear layers -----------------------------------------------------------------------------------

LINEAR_SHAPES = [(1, 7, 5), (2, 64, 96), (16, 33, 20), (37, 64, 3), (70, 96, 200), (300, 130, 65)]


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEAR_SHAPES)
def test_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int, with_bias: bool) -> None:
    kernels = KERNELS[dtype]
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if with_bias else None
    packed = kernels.pack_linear(weight, bias)
    assert (packed.in_features, packed.out_features) == (inputs, outputs)
    expected = x.double() @ weight.to(dtype).double().T + (0 if bias is None else bias)
    _close(kernels.linear(x, packed), expected, TOLERANCE[dtype])
    _close(kernels.linear(x, packed, out_dtype=F32), expected, TOLERANCE[F32])
    total = torch.randn(rows, outputs)
    before = total.clone()
    assert kernels.linear(x, packed, add_to=total) is total
    _close(total, before + expected, TOLERANCE[F32])


@DTYPES
def test_linear_takes_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    kernels = KERNELS[dtype]
    wide, packed = torch.randn(9, 100).to(dtype), kernels.pack_linear(torch.randn(40, 64), None)
    rows = wide[::2, 3:67]
    assert torch.equal(kernels.linear(rows, packed), kernels.linear(rows.contiguous(), packed))
    assert kernels.linear(wide[:0, :64], packed).shape == (0, 40)


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (130, 65), (1536, 70)])
def test_a_row_of_linear_has_the_same_bits_in_any_company(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    kernels = KERNELS[dtype]
    x = torch.randn(600, inputs).to(dtype)
    packed = kernels.pack_linear(torch.randn(outputs, inputs), torch.randn(outputs))
    native.set_threads(1)
    alone = torch.cat([kernels.linear(x[i : i + 1], packed, out_dtype=F32) for i in range(70)])
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for count in [*range(1, 71), 255, 289, 600]:
            together = kernels.linear(x[:count], packed, out_dtype=F32)
            assert torch.equal(together[:70], alone[:count]), (threads, count)


@DTYPES
def test_linear_refuses_what_it_cannot_read(dtype: torch.dtype) -> None:
    kernels = KERNELS[dtype]
    packed = kernels.pack_linear(torch.randn(8, 16), None)
    with pytest.raises(ValueError, match=r"takes \[tokens, 16\]"):
        kernels.linear(torch.zeros(2, 15, dtype=dtype), packed)
    with pytest.raises(ValueError, match="takes"):
        kernels.linear(torch.zeros(2, 16, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="add_to"):
        kernels.linear(torch.zeros(2, 16, dtype=dtype), packed, add_to=torch.zeros(3, 8))


# ---- norms and activations ---------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (16, 64), (70, 577)])
def test_rms_norm(dtype: torch.dtype, rows: int, columns: int) -> None:
    kernels = KERNELS[dtype]
    x, weight = 3 * torch.randn(rows, columns), torch.randn(columns)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    found = kernels.rms_norm(x, weight, 1e-5)
    assert found.dtype is dtype
    _close(found, expected, TOLERANCE[dtype])
    total = torch.randn(rows, columns)
    before = total.clone()
    assert kernels.rms_norm(x, weight, 1e-5, add_to=total) is total
    _close(total, before + expected, TOLERANCE[F32])
    alone = torch.cat([kernels.rms_norm(x[i : i + 1], weight, 1e-5) for i in range(rows)])
    assert torch.equal(found, alone)


def _gated(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    # 0.5 (1 + tanh(y)) is the logistic function of 2 y.
    return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) * up


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inputs", "width"), [(130, 97), (64, 16), (33, 5)])
def test_gated_linear(
    dtype: torch.dtype, activation: Activation, with_bias: bool, inputs: int, width: int
) -> None:
    kernels = KERNELS[dtype]
    x, weight = torch.randn(300, inputs).to(dtype), torch.randn(2 * width, inputs)
    bias = torch.randn(2 * width) if with_bias else None
    packed = kernels.pack_gated(weight, bias)
    assert (packed.in_features, packed.out_features) == (inputs, width)
    found = kernels.gated_linear(x, packed, activation)
    # Gate and up are what the plain layer gives, rounded; fusing changes no bit of them.
    gate_up = kernels.linear(x, kernels.pack_linear(weight, bias))
    _close(found, _gated(gate_up, activation), TOLERANCE[dtype])
    for rows in (1, 2, 5, 17, 33, 70):
        assert torch.equal(kernels.gated_linear(x[:rows], packed, activation), found[:rows]), rows


def test_gated_linear_refuses_an_odd_weight() -> None:
    with pytest.raises(ValueError, match="one width"):
        KERNELS[F32].pack_gated(torch.zeros(7, 4), None)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_are_accurate_over_their_whole_range(activation: Activation) -> None:
    gate = torch.cat([torch.linspace(-20, 20, 20001), torch.logspace(-30, 0, 500)])
    gate = torch.cat([gate, torch.tensor([100.0, -100.0, -1e4])])
    gate_up = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    packed = KERNELS[F32].pack_gated(gate_up.T.contiguous(), None)
    found = KERNELS[F32].gated_linear(torch.ones(1, 1), packed, activation)
    expected = _gated(gate_up, activation)
    # exp(-2y) carries an error of about 2y units in the last place, and 2y reaches 70 here.
    limit = 6e-7 if activation == "silu" else 2e-5
    shown = expected.abs() > 1e-30
    assert ((found - expected) / expected)[shown].abs().max() < limit
    assert (found[~shown].abs() < 1e-30).all()


# ---- attention ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Sequences of given lengths with known keys and values, their pages scattered over a pool."""

    kernels: NativeKernels
    spec: AttentionSpec
    cache: KVCacheLayer
    table: Tensor
    q: list[Tensor]  # each [length, heads, head_dim]
    k: list[Tensor]
    v: list[Tensor]

    def batch(self, spans: list[tuple[int, int, int]]) -> Batch:
        """Spans are (sequence, first position, end position)."""
        counts = [end - first for _, first, end in spans]
        positions = torch.cat([torch.arange(first, end) for _, first, end in spans]).int()
        starts = torch.tensor([0, *itertools.accumulate(counts)]).int()
        context = torch.tensor([end for *_, end in spans]).int()
        table = self.table[[s for s, *_ in spans]].clone()
        if self.spec.window is not None:
            for row, (_, first, _) in zip(table, spans, strict=True):
                row[: max(0, first - self.spec.window + 1) // self.cache.block_size] = -1
        return Batch(torch.zeros_like(positions), positions, starts, context, (table,))

    def write(self, spans: list[tuple[int, int, int]]) -> None:
        """Store keys and values unrotated (cosine 1, sine 0)."""
        half = self.spec.head_dim // 2
        cos_sin = torch.cat([torch.ones(2048, half), torch.zeros(2048, half)], -1)
        rows = [torch.cat([x[s][a:b] for x in (self.q, self.k, self.v)], 1) for s, a, b in spans]
        qkv = torch.cat(rows).flatten(1)
        self.kernels.rotate_and_store(qkv, self.batch(spans), self.cache, self.spec, cos_sin, None, None, 0.0)

    def attend(self, spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        q = torch.cat([self.q[s][a:b] for s, a, b in spans]).flatten(1)
        return self.kernels.attention(q, self.batch(spans), self.cache, self.spec)

    def expected(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Of all positions of a sequence, in float64: [length, heads * head_dim] and [length, heads]."""
        spec = self.spec
        q, k, v = (x[sequence].double() for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = distance < 0
        if spec.window is not None:
            hidden = hidden | (distance >= spec.window)
        scores = scores.masked_fill(hidden, -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out.flatten(1), scores.logsumexp(-1).T


def _scene(
    dtype: torch.dtype,
    lengths: list[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
) -> Scene:
    kernels = KERNELS[dtype]
    counts = [-(-n // block_size) for n in lengths]
    pages = kernels.allocate_kv(sum(counts) + 5, 2, kv_heads, head_dim, block_size)
    if head_dim % 16 == 0:
        pages.fill_(math.nan)  # what is not written must not be read
    order = torch.randperm(pages.shape[0]).int().tolist()
    table = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap)
    cache = KVCacheLayer(pages, 0, 1, kv_heads, head_dim, block_size)

    def rows(count: int) -> list[Tensor]:
        return [torch.randn(n, count, head_dim).to(dtype) for n in lengths]

    scene = Scene(kernels, spec, cache, table, rows(heads), rows(kv_heads), rows(kv_heads))
    scene.write([(s, 0, n) for s, n in enumerate(lengths)])
    return scene


SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-query, wide head": {"heads": 5, "kv_heads": 1, "head_dim": 128},
    "every head its own": {"heads": 3, "kv_heads": 3, "head_dim": 80},
    "more heads than a tile": {"heads": 40, "kv_heads": 1, "head_dim": 32},
    "odd head size": {"heads": 4, "kv_heads": 2, "head_dim": 20, "block_size": 5},
    "blocks of one": {"block_size": 1},
    "blocks of 48": {"block_size": 48},
    "window": {"window": 33},
    "window of one": {"window": 1, "block_size": 7},
    "wide window, capped": {"window": 300, "softcap": 2.0},
}
FORCED = "HEADRACE_NATIVE_ISA" in os.environ
# At a forced instruction set, those that take different ways through the code.
CHOSEN = pytest.mark.parametrize("shape", ["grouped", "odd head size"] if FORCED else list(SHAPES))


@DTYPES
@CHOSEN
def test_attention(dtype: torch.dtype, shape: str) -> None:
    lengths = [1, 45, 650]
    scene = _scene(dtype, lengths, **SHAPES[shape])
    out, lse = scene.attend([(s, 0, n) for s, n in enumerate(lengths)])
    expected = [scene.expected(s) for s in range(len(lengths))]
    # In bfloat16 the weights are rounded before they are summed, and the result once more.
    _close(out, torch.cat([o for o, _ in expected]), {F32: 4e-6, BF16: 8e-3}[dtype])
    _close(lse, torch.cat([log for _, log in expected]), 4e-6)


@DTYPES
@CHOSEN
def test_a_query_has_the_same_bits_however_its_step_was_cut(dtype: torch.dtype, shape: str) -> None:
    """Whole prompt, chunks, or token by token; any batch-mates; one, two or three threads."""
    lengths = [1050, 45]
    scene = _scene(dtype, lengths, **SHAPES[shape])
    native.set_threads(1)
    whole = scene.attend([(0, 0, 1050)])
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for size in (16, 37, 1049):
            chunks = [
                scene.attend([(1, 3, 40), (0, a, min(a + size, 1050)), (1, 44, 45)])
                for a in range(0, 1050, size)
            ]
            for found, expected in zip(zip(*chunks, strict=True), whole, strict=True):
                assert torch.equal(torch.cat([x[37:-1] for x in found]), expected), (threads, size)
        for position in (0, 15, 16, 300, 511, 512, 1023, 1024, 1049):
            decoded = scene.attend([(0, position, position + 1)])
            for found, expected in zip(decoded, whole, strict=True):
                assert torch.equal(found[0], expected[position]), (threads, position)


@DTYPES
def test_a_block_of_any_size_gives_the_same_bits(dtype: torch.dtype) -> None:
    results = []
    for block_size in (16, 5, 32, 64):
        torch.manual_seed(1)
        scene = _scene(dtype, [600], block_size=block_size)
        torch.manual_seed(2)
        q, k, v = (torch.randn(600, n, 64).to(dtype) for n in (6, 2, 2))
        scene = replace(scene, q=[q], k=[k], v=[v])
        scene.write([(0, 0, 600)])
        results.append(scene.attend([(0, 0, 600)])[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_log_sum_exp_merges_partial_results() -> None:
    scene = _scene(F32, [800])
    whole, _ = scene.attend([(0, 799, 800)])
    # Keys 0-399 seen by a query at 399, keys 400-799 through a window: two parts of the same softmax.
    q = scene.q[0][799:800].flatten(1)
    first, first_lse = scene.kernels.attention(q, scene.batch([(0, 399, 400)]), scene.cache, scene.spec)
    windowed = replace(scene.spec, window=400)
    second, second_lse = scene.kernels.attention(q, scene.batch([(0, 799, 800)]), scene.cache, windowed)
    share = torch.sigmoid(first_lse - second_lse).view(6, 1)
    merged = share * first.view(6, 64) + (1 - share) * second.view(6, 64)
    _close(merged.flatten(), whole.flatten(), 2e-6)


@DTYPES
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_rotation(dtype: torch.dtype, with_norm: bool, head_dim: int) -> None:
    """Queries directly; keys through the scores of a query that is all ones but for one dimension."""
    tokens, heads, kv_heads = 37, 4, 2
    scene = _scene(dtype, [tokens], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=16)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    angles = torch.rand(64, head_dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    q_norm, k_norm = (torch.rand(head_dim) + 0.5 if with_norm else None for _ in "qk")
    batch = scene.batch([(0, 0, tokens)])
    arguments = (scene.cache, scene.spec, cos_sin, q_norm, k_norm, 1e-6)
    found = scene.kernels.rotate_and_store(qkv.flatten(1), batch, *arguments)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.double()
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        cosine, sine = angles[:tokens].double().cos()[:, None], angles[:tokens].double().sin()[:, None]
        left, right = x.chunk(2, -1)
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)

    _close(found, turned(qkv[:, :heads], q_norm).flatten(1), TOLERANCE[dtype])
    k = turned(qkv[:, heads : heads + kv_heads], k_norm).to(dtype)
    v = qkv[:, heads + kv_heads :]
    stored = replace(scene, q=[found.view(tokens, heads, head_dim)], k=[k], v=[v])
    out, lse = stored.attend([(0, 0, tokens)])
    expected, expected_lse = stored.expected(0)
    _close(out, expected, {F32: 4e-6, BF16: 8e-3}[dtype])
    # A key may round to its neighbour in bfloat16 where float32 and float64 fall on two sides of a tie.
    _close(lse, expected_lse, {F32: 4e-6, BF16: 1e-3}[dtype])
    one = scene.batch([(0, 20, 21)])
    assert torch.equal(scene.kernels.rotate_and_store(qkv[20:21].flatten(1), one, *arguments)[0], found[20])


def test_pages_that_are_not_the_pools_are_refused() -> None:
    scene = _scene(F32, [40], block_size=16)
    q = scene.q[0][39:40].flatten(1)
    for wrong in (-1, scene.cache.pages.shape[0]):
        batch = scene.batch([(0, 39, 40)])
        batch.tables[0][0, 1] = wrong
        with pytest.raises(IndexError, match=rf"entry 1 of its block table .* is {wrong}"):
            scene.kernels.attention(q, batch, scene.cache, scene.spec)
    beyond = Batch(
        torch.zeros(1).int(),
        torch.tensor([5000]).int(),
        torch.tensor([0, 1]).int(),
        torch.tensor([5001]).int(),
        (scene.table,),
    )
    with pytest.raises(IndexError, match=r"entry 312 .* is missing"):
        scene.kernels.attention(q, beyond, scene.cache, replace(scene.spec, window=1))


# ---- threads and instruction sets --------------------------------------------------------------------


def test_the_pool_survives_a_fork() -> None:
    program = """
import os, torch
from headrace.kernels.native import NativeKernels
kernels = NativeKernels(dtype=torch.float32, threads=3)
packed, x = kernels.pack_linear(torch.randn(640, 64), None), torch.randn(40, 64)
before = kernels.linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.linear(x, packed), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(kernels.linear(x, packed), before)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    environment = {**os.environ, "HEADRACE_NATIVE_ISA": "mmx"}
    command = [sys.executable, "-c", "import headrace._native"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "HEADRACE_NATIVE_ISA=mmx is not one of this machine's levels (portable" in result.stderr


LEVELS = ["portable", "avx2", "avx512", "amx"]


@pytest.mark.skipif(FORCED, reason="already runs at one forced instruction set")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_instruction_sets(level: str) -> None:
    if LEVELS.index(level) >= LEVELS.index(native.level()):
        pytest.skip(f"this machine's best instruction set is {native.level()}, which the other tests use")
    environment = {**os.environ, "HEADRACE_NATIVE_ISA": level}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--noconftest",
        "-k",
        "not fork and not refuse",
        __file__,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stdout + result.stderr
