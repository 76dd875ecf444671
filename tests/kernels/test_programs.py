"""Programs against the same operations called one by one: equal bits, for any number of rows."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.engine.plan import RowStart
from headrace.execution.sampler import RowSampler, sample_rows
from headrace.kernels import AttentionSpec, KVCacheLayer, Operations
from headrace.kernels.base import Kernels
from headrace.kernels.batch import Batch, no_sequences
from headrace.kernels.reference import TorchKernels
from headrace.protocol.requests import SamplingParams

native = pytest.importorskip(
    "headrace._native", reason="the native kernels are not built: no C++ compiler when headrace was installed"
)
from headrace.kernels.native import NativeKernels  # noqa: E402

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 70, 48, 80, 4, 2, 16, 16
SPEC = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, 0.25, 20, None)


class Tiny:
    """Two layers with every operation in them, and pages of their own."""

    def __init__(self, kernels: Kernels) -> None:
        torch.manual_seed(1)
        self.kernels = kernels
        self.table = torch.randn(VOCAB, HIDDEN).to(kernels.dtype)
        self.norm, self.head_norm = torch.rand(HIDDEN) + 0.5, torch.rand(HEAD_DIM) + 0.5
        self.qkv = kernels.pack_linear(torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN) / 7, None)
        self.output = kernels.pack_linear(torch.randn(HIDDEN, HEADS * HEAD_DIM) / 7, torch.randn(HIDDEN))
        self.gate_up = kernels.pack_gated(torch.randn(2 * FFN, HIDDEN) / 7, None)
        self.down = kernels.pack_linear(torch.randn(HIDDEN, FFN) / 7, None)
        self.cos_sin = torch.randn(256, HEAD_DIM)
        pages = kernels.allocate_kv(16, 2, KV_HEADS, HEAD_DIM, BLOCK)
        self.caches = [KVCacheLayer(pages, 0, layer, KV_HEADS, HEAD_DIM, BLOCK) for layer in range(2)]

    def forward(self, ops: Operations, token_ids: Tensor, batch: Batch) -> Tensor:
        hidden = ops.embed(token_ids, self.table, 1.5)
        for cache in self.caches:
            qkv = ops.linear(ops.rms_norm(hidden, self.norm, 1e-6), self.qkv)
            q = ops.rotate_and_store(qkv, batch, cache, SPEC, self.cos_sin, self.head_norm, None, 1e-6)
            attended, _ = ops.attention(q, batch, cache, SPEC)
            projected = ops.linear(attended, self.output, out_dtype=torch.float32)
            ops.rms_norm(projected, self.norm, 1e-6, add_to=hidden)
            gated = ops.gated_linear(ops.rms_norm(hidden, self.norm, 1e-6), self.gate_up, "silu")
            ops.linear(gated, self.down, add_to=hidden)
        return ops.soft_cap(hidden, 3.0)


def batch_of(*counts: int) -> Batch:
    """Sequences of so many tokens from their beginning, each in four pages."""
    return Batch(
        torch.randint(VOCAB, (sum(counts),), dtype=torch.int32),
        torch.cat([torch.arange(n, dtype=torch.int32) for n in counts]),
        torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        (torch.arange(len(counts) * 4, dtype=torch.int32).view(-1, 4),),
    )


TOKEN_IDS = torch.empty(1, dtype=torch.int32, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_program_computes_what_its_operations_compute(dtype: torch.dtype) -> None:
    tiny = Tiny(NativeKernels(dtype=dtype))
    program = tiny.kernels.capture(tiny.forward, TOKEN_IDS)
    for counts in [(1,), (60, 3), (5, 1, 1), (2,), (64, 64, 64)]:
        batch = batch_of(*counts)
        kept = program.run(batch.token_ids, batch)
        copy = kept.clone()
        assert torch.equal(kept, tiny.forward(tiny.kernels, batch.token_ids, batch)), counts
        program.run(batch.token_ids.flip(0), batch)
        assert torch.equal(kept, copy), "a result is the caller's own"


def test_both_libraries_capture_the_same_pass() -> None:
    tinies = [Tiny(NativeKernels(dtype=torch.float32)), Tiny(TorchKernels(dtype=torch.float32))]
    batch = batch_of(30, 2)
    ours, theirs = [t.kernels.capture(t.forward, TOKEN_IDS).run(batch.token_ids, batch) for t in tinies]
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_slots_that_do_not_live_together_share_memory() -> None:
    tiny = Tiny(NativeKernels(dtype=torch.bfloat16))
    program = tiny.kernels.capture(tiny.forward, TOKEN_IDS)
    # The most that is alive at one time is a normed row and its projection, 128 bytes and 256; all slots
    # together are 2,304. A projection that finds no hole of its size takes 64 more.
    assert 128 + 256 <= program.row_bytes <= 128 + 256 + 64


def test_the_embedding_and_the_cap_are_those_of_torch() -> None:
    table, ids = torch.randn(90, 37).bfloat16(), torch.randint(90, (50,), dtype=torch.int32)
    ours, theirs = (library(dtype=torch.bfloat16) for library in (NativeKernels, TorchKernels))
    assert torch.equal(ours.embed(ids, table, 6.1), theirs.embed(ids, table, 6.1))
    x = torch.randn(3, 1003) * 40
    capped = ours.soft_cap(x.clone(), 30.0)
    torch.testing.assert_close(capped, theirs.soft_cap(x.clone(), 30.0), rtol=1e-6, atol=1e-6)
    for row, alone in zip(capped, x, strict=True):
        assert torch.equal(row, ours.soft_cap(alone[None].clone(), 30.0)[0])


def test_a_program_refuses_what_it_cannot_run() -> None:
    tiny = Tiny(NativeKernels(dtype=torch.bfloat16))
    program = tiny.kernels.capture(tiny.forward, TOKEN_IDS)
    batch = batch_of(4)
    with pytest.raises(IndexError, match=f"token id {VOCAB} at row 2"):
        program.run(torch.tensor([1, 2, VOCAB, 3], dtype=torch.int32), batch)
    with pytest.raises(ValueError, match="came with 3 rows"):
        program.run(batch.token_ids[:3], batch)
    with pytest.raises(ValueError, match=r"takes contiguous torch\.int32"):
        program.run(batch.token_ids.long(), batch)
    batch.tables[0][0, 0] = 16
    with pytest.raises(IndexError, match="not one of the pool's 16 pages"):
        program.run(batch.token_ids, batch)


def test_a_pass_may_use_operations_alone() -> None:
    kernels = NativeKernels(dtype=torch.float32)
    weight = torch.ones(8)
    with pytest.raises(ValueError, match="uses operations alone"):
        kernels.capture(lambda ops, x, _: ops.rms_norm(x * 2, weight, 0.0), torch.empty(1, 8))


def test_a_program_of_no_rows_gives_none() -> None:
    kernels = NativeKernels(dtype=torch.float32)
    program = kernels.capture(lambda ops, x, _: ops.rms_norm(x, torch.ones(8), 0.0), torch.empty(1, 8))
    assert program.run(torch.empty(0, 8), no_sequences()).shape == (0, 8)


def test_a_whole_vocabulary_is_sampled_as_numpy_samples_it() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 49_153)).astype(np.float32) * 3
    logits[1, :40_000] = -90.0
    temperatures = [0.0, 1.0, 0.7, 5.0, 200.0, 0.01]
    for seed in range(12):
        samplers = [
            RowSampler(
                RowStart(0, [1], 1, SamplingParams(max_tokens=9, temperature=t), seed + i, None, []),
                logits.shape[1],
                frozenset(),
            )
            for i, t in enumerate(temperatures)
        ]
        want = [one.sample(row, seed) for one, row in zip(samplers, logits, strict=True)]
        assert sample_rows(samplers, logits, [seed] * 6) == want


@pytest.mark.skipif("HEADRACE_NATIVE_ISA" in os.environ, reason="already runs at one forced instruction set")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_lower_instruction_sets(level: str) -> None:
    levels = ["portable", "avx2", "avx512", "amx"]
    if levels.index(level) >= levels.index(native.level()):
        pytest.skip(f"this machine's best instruction set is {native.level()}, which the other tests use")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "--noconftest", __file__],
        env={**os.environ, "HEADRACE_NATIVE_ISA": level},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
