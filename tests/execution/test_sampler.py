"""The sampler against transformers' processors and against exact distributions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headrace.engine.plan import RowStart
from headrace.execution.sampler import NoChoice, RowSampler, sample_rows, token_logprobs
from headrace.protocol.requests import ErrorCode, SamplingParams

VOCAB = 64
EOS = frozenset({7})


def sampler(tokens=(1, 2, 3), prompt_length=3, seed=5, **params) -> RowSampler:
    start = RowStart(
        row=0,
        tokens=list(tokens),
        prompt_length=prompt_length,
        sampling=SamplingParams(max_tokens=1000, seed=seed, **params),
        seed=seed,
        prompt_logprobs=None,
        tables=[],
    )
    return RowSampler(start, VOCAB, EOS)


def random_logits(seed=0, scale=2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def draws(row: np.ndarray, count: int, **params) -> np.ndarray:
    """How often each token is drawn over many seeds, at one position."""
    counts = np.zeros(VOCAB)
    for seed in range(count):
        counts[sampler(seed=seed, **params).sample(row, 3)] += 1
    return counts


def expected(row: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution that transformers' warpers give."""
    scores = torch.from_numpy(row)[None] / temperature
    ids = torch.zeros((1, 1), dtype=torch.long)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Within five standard deviations of the chi-square statistic's mean."""
    total = counts.sum()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    mean = probabilities[possible] * total
    statistic = ((counts[possible] - mean) ** 2 / mean).sum()
    freedom = possible.sum() - 1
    return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(params):
    row = random_logits()
    probabilities = expected(row, **params)
    counts = draws(row, 4000, **params)
    assert chi_square_is_plausible(counts, probabilities)
    wrong = expected(row, **{**params, "temperature": params.get("temperature", 1.0) * 2})
    assert not chi_square_is_plausible(counts, np.where(probabilities > 0, wrong + 1e-9, 0))


def test_positions_and_seeds_give_independent_noise():
    row = np.zeros(VOCAB, np.float32)
    by_position = [sampler().sample(row, position) for position in range(3, 2003)]
    assert chi_square_is_plausible(np.bincount(by_position, minlength=VOCAB), np.full(VOCAB, 1 / VOCAB))
    pairs = np.bincount([a * VOCAB + b for a, b in pairwise(by_position)])
    assert pairs.max() <= 8


def test_a_choice_depends_on_seed_and_position_alone():
    row = random_logits()
    assert sampler(seed=9).sample(row, 40) == sampler(seed=9, tokens=range(3, 40)).sample(row, 40)
    assert len({sampler(seed=seed).sample(row, 3) for seed in range(40)}) > 5


def test_greedy_takes_the_first_of_equal_maxima_and_ignores_noise():
    row = random_logits()
    row[[11, 40]] = row.max() + 1
    assert {sampler(seed=seed, temperature=0.0).sample(row, 3) for seed in range(20)} == {11}


def test_top_k_of_equal_logits_keeps_exactly_k():
    row = np.zeros(VOCAB, np.float32)
    assert set(np.flatnonzero(draws(row, 500, top_k=3))) == {0, 1, 2}


def test_repetition_penalty_is_that_of_transformers():
    row = random_logits()
    tokens = [1, 2, 3, 3, 9]
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), torch.from_numpy(row)[None])[0]
    got = sampler(tokens=tokens, repetition_penalty=1.7)._process(row, 5)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_presence_and_frequency_count_output_tokens_only():
    row = random_logits()
    got = sampler(tokens=[1, 2, 3, 9, 9], presence_penalty=0.5, frequency_penalty=0.25)._process(row, 5)
    want = row.copy()
    want[9] -= 0.5 + 2 * 0.25
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_penalties_remember_what_was_sampled_as_a_resumed_row_does():
    row = random_logits()
    running = sampler(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.2)
    generated = [running.sample(row, 3 + i) for i in range(12)]
    assert len(set(generated)) > 3
    resumed = sampler(
        tokens=[1, 2, 3, *generated[:6]], temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.2
    )
    assert [resumed.sample(row, 9 + i) for i in range(6)] == generated[6:]


def test_logit_bias_forces_and_forbids():
    row = random_logits()
    assert sampler(temperature=0.0, logit_bias={33: 100.0}).sample(row, 3) == 33
    best = int(row.argmax())
    assert sampler(temperature=0.0, logit_bias={best: -100.0}).sample(row, 3) != best


def test_stops_cannot_be_sampled_before_min_tokens():
    row = np.full(VOCAB, -50, np.float32)
    row[7], row[8], row[9] = 50, 40, 30
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (8,)}
    assert [sampler(**params).sample(row, position) for position in (3, 4, 5)] == [9, 9, 7]
    assert sampler(**params, ignore_eos=True).sample(row, 3) == 7


def test_the_input_is_left_as_it_is():
    row = random_logits()
    before = row.copy()
    sampler(repetition_penalty=2.0, min_tokens=5, logit_bias={1: 3.0}, presence_penalty=1.0).sample(row, 3)
    np.testing.assert_array_equal(row, before)


def test_logits_without_a_finite_maximum_are_the_models_fault():
    with pytest.raises(NoChoice, match="position 3") as raised:
        sampler().sample(np.full(VOCAB, np.nan, np.float32), 3)
    assert raised.value.error.code is ErrorCode.INTERNAL


def test_forbidding_every_token_is_the_requests_fault():
    with pytest.raises(NoChoice, match="no token is left to choose at position 3") as raised:
        sampler(min_tokens=1, stop_token_ids=tuple(range(VOCAB))).sample(random_logits(), 3)
    assert raised.value.error.code is ErrorCode.INVALID


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_furthest_repetition_penalties_can_be_computed(penalty):
    row = np.full(VOCAB, 1e4, np.float32) * np.where(np.arange(VOCAB) % 2, 1, -1).astype(np.float32)
    sampler(tokens=list(range(VOCAB)), repetition_penalty=penalty).sample(row, VOCAB)


def test_logprobs_are_the_log_softmax_with_rank_and_alternatives():
    row = random_logits()
    want = torch.log_softmax(torch.from_numpy(row).double(), -1).numpy()
    order = np.argsort(-row)
    got = token_logprobs(row, int(order[4]), 3)
    assert got.rank == 5
    assert got.logprob == pytest.approx(want[order[4]], abs=1e-9)
    assert [token for token, _ in got.top] == order[:3].tolist()
    assert [value for _, value in got.top] == pytest.approx(want[order[:3]].tolist(), abs=1e-9)


MIXED = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 30.0},
    {"top_k": 9, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"frequency_penalty": 0.7, "presence_penalty": 0.2},
    {"temperature": 1.4, "logit_bias": {3: 4.0, 5: -100.0}, "min_tokens": 4},
]


def test_rows_sampled_together_get_the_tokens_that_each_gets_alone():
    generator = np.random.default_rng(4)
    for round_ in range(60):
        logits = (generator.standard_normal((len(MIXED), VOCAB)) * 4).astype(np.float32)
        logits[:, 20] = -np.inf
        logits[::2, [11, 40]] = 9.5
        together = [sampler(seed=round_ * 10 + i, **params) for i, params in enumerate(MIXED)]
        alone = [sampler(seed=round_ * 10 + i, **params) for i, params in enumerate(MIXED)]
        for step in range(4):
            positions = [3 + step] * len(MIXED)
            want = [one.sample(row, 3 + step) for one, row in zip(alone, logits, strict=True)]
            assert sample_rows(together, logits, positions) == want


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
def test_of_rows_sampled_together_only_the_broken_one_fails(bad):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, VOCAB - 1] = bad
    first, broken, last = sample_rows([sampler() for _ in range(3)], logits, [4, 5, 6])
    assert isinstance(broken, NoChoice) and broken.error.code is ErrorCode.INTERNAL
    assert isinstance(first, int) and isinstance(last, int)
