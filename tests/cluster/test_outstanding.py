"""What a more urgent newcomer overtakes at a worker, by what is known of it without asking."""

from __future__ import annotations

import random

import pytest

from headrace.cluster.classes import RANKS, Band
from headrace.cluster.outstanding import Outstanding


def test_the_less_urgent_are_overtaken_but_for_the_one_that_may_have_been_begun() -> None:
    prompts = Outstanding()
    for name, band in (("l1", Band.LOW), ("n1", Band.NORMAL), ("l2", Band.LOW), ("l3", Band.LOW)):
        prompts.add(name, band, 100)
    assert prompts.overtaken_by(Band.NORMAL, 400.0) == 200.0
    assert prompts.overtaken_by(Band.HIGH, 400.0) == 300.0
    assert prompts.overtaken_by(Band.LOW, 400.0) == 0.0
    assert prompts.overtaken_by(Band.NORMAL, 250.0) == 50.0  # 150 are computed, perhaps of these
    for name in ("n1", "l1", "l2", "l1"):
        prompts.drop(name)
    assert prompts.overtaken_by(Band.HIGH, 100.0) == 0.0
    assert len(prompts) == 1


@pytest.mark.parametrize("seed", range(20))
def test_never_more_is_overtaken_than_is_left_of_the_less_urgent_that_are_not_begun(seed: int) -> None:
    """A worker that computes the most urgent of those that are there, each to its end."""
    chance = random.Random(seed)
    prompts, left, begun = Outstanding(), dict[str, tuple[Band, int]](), ""
    for number in range(200):
        band, tokens = chance.choice(list(Band)), chance.randrange(1, 100)
        prompts.add(f"{number}", band, tokens)
        left[f"{number}"] = band, tokens
        computes = chance.randrange(120)
        while computes and left:
            begun = begun or min(left, key=lambda name: RANKS[left[name][0]])
            band, tokens = left[begun]
            done = min(tokens, computes)
            computes -= done
            left[begun] = band, tokens - done
            if done == tokens:
                prompts.drop(begun)
                del left[begun]
                begun = ""
        queued = sum(tokens for _, tokens in left.values())
        for newcomer in Band:
            behind = sum(
                tokens
                for name, (band, tokens) in left.items()
                if RANKS[band] > RANKS[newcomer] and name != begun
            )
            assert prompts.overtaken_by(newcomer, queued) <= behind
