"""The demo models continue 20 prompts for 64 tokens as transformers does in float32.

What transformers generated is recorded by `record_greedy.py`, since it takes it minutes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from paged import PagedRun, make_kernels
from record_greedy import TOKENS, fixture_path

from headrace.models import load_decoder


@dataclass(frozen=True)
class Run:
    """One prompt, what follows it, and the gap to the second-best logit at each token."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


def _recorded(name: str, directory: Path) -> list[Run]:
    recorded = json.loads(fixture_path(name).read_text())
    imported = json.loads((directory / "headrace.json").read_text())["sha256"]
    assert recorded["made_by"]["gguf_sha256"] == imported, "recorded from another file; run record_greedy.py"
    return [Run(**run) for run in recorded["runs"]]


def _assert_equal(number: int, run: Run, ours: list[int]) -> None:
    """To the last token: no recorded gap is so small that rounding could close it (the least is 4e-4)."""
    for step, (token, expected, gap) in enumerate(zip(ours, run.tokens, run.gaps, strict=True)):
        assert token == expected, (
            f"prompt {number}, token {step}: {token} instead of {expected}, which led by {gap:.1e}"
        )


@pytest.mark.parametrize(
    ("name", "fixture"), [("smollm2-135m", "smollm2_dir"), ("gemma3-270m", "gemma3_dir")]
)
def test_native_kernels_generate_the_same_tokens(
    name: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    """All prompts in one ragged batch: prefill in chunks of at most 200 tokens, then one token a step."""
    directory: Path = request.getfixturevalue(fixture)
    runs = _recorded(name, directory)
    decoder = load_decoder(directory, make_kernels("native", threads=2), 2048)
    ours = _generate(
        PagedRun(decoder, [torch.tensor(run.prompt) for run in runs], block_size=16, room=TOKENS), runs
    )
    for number, run in enumerate(runs):
        _assert_equal(number, run, ours[number])


def _generate(paged: PagedRun, runs: list[Run]) -> list[list[int]]:
    ours: list[list[int]] = [[] for _ in runs]
    while any(len(tokens) < TOKENS for tokens in ours):
        counts = {
            number: min(200, len(run.prompt) + len(ours[number]) - paged.computed[number])
            for number, run in enumerate(runs)
            if len(ours[number]) < TOKENS
        }
        for number, logits in paged.step(counts, last=1).items():
            if paged.computed[number] == len(runs[number].prompt) + len(ours[number]):
                ours[number].append(int(logits[-1].argmax()))
                paged.extend(number, ours[number][-1:])
    return ours


def test_reference_kernels_choose_the_same_tokens(smollm2_dir: Path) -> None:
    """Every fourth short prompt and what follows it as one prompt: each position chooses what came next."""
    runs = _recorded("smollm2-135m", smollm2_dir)[3:19:4]
    decoder = load_decoder(smollm2_dir, make_kernels("reference"), 2048)
    sequences = [torch.tensor(run.prompt + run.tokens[:-1]) for run in runs]
    paged = PagedRun(decoder, sequences, block_size=16)
    for number, run in enumerate(runs):
        logits = paged.step({number: len(sequences[number])}, last=TOKENS)[number]
        _assert_equal(number, run, logits.argmax(-1).tolist())
