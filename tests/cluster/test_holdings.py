"""What the gateway knows of prefix caches: events followed, gaps noticed, guesses where nothing is told."""

from __future__ import annotations

import pytest
from members import KEY, member

from headrace.cluster.holdings import GUESS_AGE_S, Holdings, Prompt
from headrace.cluster.placement import every
from headrace.cluster.registry import Member
from headrace.engine.identity import BlockHasher
from headrace.protocol.messages import KVEvents, KVSnapshot

PROMPT = list(range(1, 18))  # four full blocks of 4, and the last token


def names(tokens: list[int] = PROMPT, salt: str = "") -> list[bytes]:
    hasher = BlockHasher(KEY, b"fp", 4)
    return hasher.chain(hasher.root(salt), tokens)


def cached(holdings: Holdings, *members: Member, now: float = 0.0, salt: str = "") -> list[float]:
    return list(holdings.cached_tokens(Prompt(PROMPT, salt), every(members).facts, now))


def holdings() -> Holdings:
    return Holdings(KEY, b"guess")


def test_what_workers_tell_is_followed_event_by_event() -> None:
    known, a, b = holdings(), member("a"), member("b")
    assert known.joined(a)
    assert known.joined(b)
    chain = names()
    assert cached(known, a, b) == [0, 0]
    known.snapshot(a, KVSnapshot(7, chain[:2]))
    known.snapshot(b, KVSnapshot(0, []))
    assert cached(known, a, b) == [8, 0]
    assert cached(known, b, a) == [0, 8]
    assert not known.changed(a, KVEvents(7, 9, chain[2:], chain[:1]))
    assert not known.changed(b, KVEvents(0, 4, chain, []))
    assert cached(known, a, b) == [0, 16]
    assert cached(known, a, b, salt="another tenant") == [0, 0]


def test_the_last_token_is_always_computed() -> None:
    known, a = holdings(), member("a")
    known.joined(a)
    known.snapshot(a, KVSnapshot(1, names()))
    assert list(known.cached_tokens(Prompt(PROMPT[:16], ""), every([a]).facts, 0.0)) == [12]


@pytest.mark.parametrize("noticed_by", ["events", "heartbeat"])
def test_a_gap_is_noticed_and_nothing_is_believed_until_the_snapshot(noticed_by: str) -> None:
    known, a = holdings(), member("a")
    known.joined(a)
    known.snapshot(a, KVSnapshot(1, names()))
    assert not known.stands_at(a, 1)
    assert known.changed(a, KVEvents(3, 4, [], [])) if noticed_by == "events" else known.stands_at(a, 3)
    assert not known.is_exact(a)
    assert not known.changed(a, KVEvents(4, 5, [], names()))  # the snapshot that was asked for has it
    known.snapshot(a, KVSnapshot(5, names()[:1]))
    assert known.is_exact(a)
    assert cached(known, a) == [4]


def test_a_worker_that_comes_again_has_nothing_until_it_says_so() -> None:
    known, a = holdings(), member("a")
    known.joined(a)
    known.snapshot(a, KVSnapshot(1, names()))
    known.lost(a)
    assert cached(known, a) == [0]
    known.joined(a)
    assert cached(known, a) == [0]


def test_of_a_worker_with_another_key_what_was_sent_there_is_guessed_for_a_while() -> None:
    known, a, told = holdings(), member("a", tells=False, num_blocks=3), member("told")
    assert not known.joined(a)
    assert known.joined(told)
    known.sent(a, Prompt(PROMPT, ""), now=5.0)
    known.sent(told, Prompt(PROMPT, ""), now=5.0)  # it will say so itself
    assert cached(known, a, told, now=6.0) == [12, 0]  # its cache has three blocks
    assert not known.is_exact(a)
    assert cached(known, a, told, now=6.0 + GUESS_AGE_S) == [0, 0]


def test_without_a_key_everything_is_guessed_and_without_caching_nothing_is() -> None:
    known, a, none = Holdings(b"", b"guess"), member("a"), member("none", prefix_caching=False)
    assert not known.joined(a)
    assert not known.joined(none)
    for one in (a, none):
        known.sent(one, Prompt(PROMPT, ""), now=0.0)
    assert cached(known, a, none) == [16, 0]


def test_workers_of_different_block_sizes_are_each_asked_in_their_own() -> None:
    known, a, b = holdings(), member("a"), member("b", block_size=8)
    known.joined(a)
    known.joined(b)
    hasher = BlockHasher(KEY, b"fp", 8)
    known.snapshot(a, KVSnapshot(1, names()[:3]))
    known.snapshot(b, KVSnapshot(1, hasher.chain(hasher.root(""), PROMPT)))
    assert cached(known, a, b) == [12, 16]
