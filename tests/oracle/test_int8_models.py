"""How far int8 weights take SmolLM2 from its float32 self, and that they keep what the other precisions keep.

The text is that of `test_models_bfloat16.py`; longer texts and both demo models are measured by
`benchmarks/quantization.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paged import PagedRun, run_chunks, run_whole
from test_models_bfloat16 import _log_probabilities

from headrace.config.engine import EngineOptions, Quantization
from headrace.execution.build import build_engine
from headrace.models import load_decoder

pytest.importorskip("headrace._native", reason="the native kernels were not built")
from headrace.kernels.native import NativeKernels

F32, BF16 = torch.float32, torch.bfloat16
# In nats. Measured: a mean of 5e-3, a largest of 5e-2, and an agreement of 0.97.
MEAN_KL = 1.5e-2
MAX_KL = 0.3
AGREEMENT = 0.93


def _kernels(dtype: torch.dtype, quantization: Quantization = "int8") -> NativeKernels:
    return NativeKernels(dtype=dtype, quantization=quantization, threads=2)


def test_int8_stays_close_to_float32(smollm2_dir: Path) -> None:
    exact = _log_probabilities(smollm2_dir, _kernels(F32, "none"))
    rounded = _log_probabilities(smollm2_dir, _kernels(BF16))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    agreement = (exact.argmax(-1) == rounded.argmax(-1)).double().mean().item()
    print(f"KL mean {divergence.mean():.1e}, max {divergence.max():.1e}, agreement {agreement:.4f}")
    assert 0 < divergence.mean() < MEAN_KL
    assert divergence.max() < MAX_KL
    assert agreement > AGREEMENT


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_int8_gives_the_same_bits_whole_and_in_chunks(dtype: torch.dtype, smollm2_dir: Path) -> None:
    torch.manual_seed(3)
    lengths = [61, 7, 40]
    texts = [torch.randint(0, 49152, (length,)) for length in lengths]
    decoder = load_decoder(smollm2_dir, _kernels(dtype), 256)
    whole = run_whole(PagedRun(decoder, texts, block_size=16), lengths)
    for chunk in (1, 16, 37):
        chunked = run_chunks(PagedRun(decoder, texts, block_size=16), lengths, chunk)
        assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True)), chunk


def test_an_engine_says_that_its_weights_are_int8(smollm2_dir: Path) -> None:
    """The fingerprint of numerics keeps cached blocks of one precision from another."""
    found = {}
    for quantization in ("none", "int8"):
        options = EngineOptions(
            directory=str(smollm2_dir),
            served_name="m",
            quantization=quantization,
            threads=2,
            max_model_len=64,
            kv_cache_memory=16 << 20,
        )
        found[quantization] = build_engine(options).info
    assert "int8" in found["int8"].numerics
    assert found["int8"].numerics != found["none"].numerics
    assert any("int8" in note for note in found["int8"].notes)
    assert not any("int8" in note for note in found["none"].notes)
