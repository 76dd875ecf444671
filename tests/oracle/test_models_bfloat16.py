"""How far bfloat16 takes SmolLM2 from its float32 self: KL divergence and the most likely token.

Float32 is the reference kernels', which `test_models_greedy.py` holds to transformers. The text is six of
the recorded prompts and their continuations, about 460 positions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paged import LIBRARIES, PagedRun, make_kernels
from record_greedy import fixture_path
from torch import Tensor

from headrace.kernels.base import Kernels
from headrace.models import load_decoder

# In nats. Both kernel libraries measure a mean of 2e-4, a largest of 5e-3, and an agreement of 0.995.
MEAN_KL = 5e-4
MAX_KL = 2e-2
AGREEMENT = 0.985


def _log_probabilities(directory: Path, kernels: Kernels) -> Tensor:
    """[positions, vocab] over all texts."""
    runs = json.loads(fixture_path("smollm2-135m").read_text())["runs"][:6]
    texts = [torch.tensor(run["prompt"] + run["tokens"]) for run in runs]
    paged = PagedRun(load_decoder(directory, kernels, 1024), texts, block_size=16)
    logits = paged.step({number: len(text) for number, text in enumerate(texts)})
    return torch.cat([logits[number] for number in range(len(texts))]).log_softmax(-1)


@pytest.fixture(scope="module")
def exact(smollm2_dir: Path) -> Tensor:
    return _log_probabilities(smollm2_dir, make_kernels("reference"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_bfloat16_stays_close_to_float32(library: str, exact: Tensor, smollm2_dir: Path) -> None:
    rounded = _log_probabilities(smollm2_dir, make_kernels(library, torch.bfloat16))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    agreement = (exact.argmax(-1) == rounded.argmax(-1)).double().mean().item()
    print(
        f"{library}: KL mean {divergence.mean():.1e}, max {divergence.max():.1e}, agreement {agreement:.4f}"
    )
    assert 0 < divergence.mean() < MEAN_KL
    assert divergence.max() < MAX_KL
    assert agreement > AGREEMENT
