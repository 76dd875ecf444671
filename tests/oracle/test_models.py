"""Every family against transformers in float32, through the paged cache: prefill, chunks, decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from paged import LIBRARIES, PagedRun, make_kernels, run_chunks, run_whole
from random_models import MAX_LEN, MODELS, make
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3 import modeling_gemma3

from headrace.models import load_decoder
from headrace.models.decoder import Decoder

LENGTHS = (MAX_LEN, 1, 37, 64)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Oracle:
    """A model on disk, sequences, and the logits that transformers gives for each by itself."""

    directory: Path
    sequences: list[Tensor]
    logits: list[Tensor]


@pytest.fixture(scope="module", params=MODELS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    torch.set_num_threads(1)  # models this small only lose by sharing the work
    model = make(request.param)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        cap = getattr(model.config, "attn_logit_softcapping", None)
        if cap is not None:
            # Transformers' Gemma 3 reads the cap and its eager attention takes one, but no call passes it on.
            capped = partial(modeling_gemma3.eager_attention_forward, softcap=cap)
            patch.setattr(modeling_gemma3, "eager_attention_forward", capped)
            model.set_attn_implementation("eager")
        return Oracle(directory, *_expected(model))


def _expected(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    vocabulary = model.get_input_embeddings().weight.shape[0] - 3  # without the multimodal markers
    longest = torch.randint(0, vocabulary, (MAX_LEN,), generator=torch.Generator().manual_seed(1))
    sequences = [longest] + [longest.flip(0).roll(length)[:length] for length in LENGTHS[1:]]
    with torch.inference_mode():
        # Dynamic scaling depends on the longest sequence seen, so that one goes first and comes along.
        logits = [
            model(torch.stack((longest, torch.nn.functional.pad(tokens, (0, MAX_LEN - len(tokens)))))).logits[
                1, : len(tokens)
            ]
            for tokens in sequences
        ]
    return sequences, logits


def test_multimodal_checkpoints_of_both_forms(tmp_path: Path) -> None:
    """Older files put the language model's name first, newer ones inside of "model."."""
    model = make("gemma3 multimodal")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    older, newer = "language_model.model.", "model.language_model."
    forms = [
        {
            name.replace(newer, older).replace("model.vision", "vision"): each
            for name, each in tensors.items()
        },
        {
            name.replace(older, newer).replace("vision", "model.vision"): each
            for name, each in tensors.items()
        },
    ]
    tokens = torch.arange(20)
    logits = []
    for form in forms:
        save_file(form, path)
        decoder = load_decoder(tmp_path, make_kernels("reference"), MAX_LEN)
        logits.append(run_whole(PagedRun(decoder, [tokens], block_size=16), [20])[0])
    assert any(name.startswith(older) for name in forms[0]) and any(
        name.startswith(newer) for name in forms[1]
    )
    assert torch.equal(*logits)


@pytest.fixture(params=LIBRARIES)
def decoder(request: pytest.FixtureRequest, oracle: Oracle) -> Decoder:
    return load_decoder(oracle.directory, make_kernels(request.param), MAX_LEN)


def _assert_close(found: list[Tensor], oracle: Oracle) -> None:
    for sequence, (ours, theirs) in enumerate(zip(found, oracle.logits, strict=True)):
        worst = (ours - theirs).abs().max().item()
        assert worst < TOLERANCE, (
            f"sequence {sequence}: logits differ by {worst:.1e} of {theirs.abs().max():.1f}"
        )


def test_prefill(decoder: Decoder, oracle: Oracle) -> None:
    run = PagedRun(decoder, oracle.sequences, block_size=16)
    _assert_close(run_whole(run, LENGTHS), oracle)


@pytest.mark.parametrize(("chunk", "block_size"), [(1, 16), (6, 5), (16, 16), (37, 16)])
def test_chunks_down_to_single_tokens(decoder: Decoder, oracle: Oracle, chunk: int, block_size: int) -> None:
    run = PagedRun(decoder, oracle.sequences, block_size=block_size, seed=chunk)
    _assert_close(run_chunks(run, LENGTHS, chunk), oracle)
