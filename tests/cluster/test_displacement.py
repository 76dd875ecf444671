"""Who makes way when all places are taken: never upwards, never in vain, and towards equal shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.classes import RANKS, Band
from headrace.cluster.displacement import who_makes_way
from headrace.cluster.waiting import Place, Waiting

PLACES = 12


@dataclass(frozen=True)
class One:
    number: int
    call: int
    band: Band
    tenant: str
    samples: int
    again: bool = False


class Queue:
    """All places of one gateway: a newcomer gets one, somebody else's, or none."""

    def __init__(self) -> None:
        self.line: Waiting[One] = Waiting()
        self.calls = 0
        self.begun: set[int] = set()
        """Calls of which some part is being served."""

    def come(self, band: Band, tenant: str, prompts: int = 1, n: int = 1) -> list[One] | None:
        """Who was displaced; None: the newcomer was refused."""
        samples = prompts * n
        lacking = samples - (PLACES - self.line.samples)
        gone = who_makes_way(self.line, band, tenant, samples, lacking, self.call_of) if lacking > 0 else []
        if gone is None:
            return None
        for one in gone:
            self.line.remove(one)
        self.calls += 1
        for number in range(prompts):
            self.add(One(number, self.calls, band, tenant, n))
        return gone

    def add(self, one: One) -> None:
        self.line.add(one, Place(one.band, one.tenant, samples=one.samples), again=one.again)

    def call_of(self, one: One) -> tuple[One, ...]:
        if one.call in self.begun:
            return ()
        return tuple(other for other in self.line if other.call == one.call)

    def held(self) -> Counter[tuple[Band, str]]:
        found: Counter[tuple[Band, str]] = Counter()
        for one in self.line:
            found[one.band, one.tenant] += one.samples
        return found


COMING = st.tuples(
    st.sampled_from(list(Band)),
    st.sampled_from("abc"),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 9),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(COMING, max_size=60))
def test_who_comes_displaces_the_less_urgent_and_who_has_more_and_nobody_else(coming: list) -> None:
    queue = Queue()
    for band, tenant, prompts, n, chance in coming:
        before, there = queue.held(), list(queue.line)
        gone = queue.come(band, tenant, prompts, n)
        after = queue.held()
        assert queue.line.samples <= PLACES
        if gone is None:
            assert list(queue.line) == there  # nobody leaves for one that does not come in
            continue
        mine = after[band, tenant]
        lacking = prompts * n - (PLACES - sum(before.values()))
        assert not gone or sum(one.samples for one in gone) >= lacking > 0
        assert not {one.call for one in gone} & queue.begun
        for call in {one.call for one in gone}:  # whole, or not at all
            assert {one for one in there if one.call == call} <= set(gone)
        for one in gone:
            assert RANKS[one.band] >= RANKS[band]
            if one.band is band:
                assert one.tenant != tenant
                assert after[band, one.tenant] >= mine
                lower = [other for other in queue.line if RANKS[other.band] > RANKS[band]]
                assert all(other.call in queue.begun for other in lower)
            later = [other for other in queue.line if (other.band, other.tenant) == (one.band, one.tenant)]
            assert all(other.call < one.call or other.call in queue.begun for other in later)
        if chance == 0:
            queue.begun.add(queue.calls)
        elif chance == 1 and (served := queue.line.first(lambda band, needs: True)) is not None:
            queue.line.serve(served)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=100, max_size=200))
def test_who_was_displaced_and_comes_again_and_again_changes_nothing_in_the_end(tenants: list[str]) -> None:
    """All come back at once, for ever: shares become equal, and from then on nobody is displaced."""
    queue, displaced = Queue(), 0
    for tenant in tenants:
        gone = queue.come(Band.NORMAL, tenant)
        displaced += len(gone or ())
        while gone:  # each tries again at once
            gone = [two for one in gone for two in queue.come(one.band, one.tenant) or ()]
            displaced += len(gone)
    held = queue.held()
    assert displaced <= PLACES  # each lowers the sum of squares of shares
    asked = Counter(tenants)
    if len(asked) == 4 and min(asked.values()) >= PLACES:
        assert set(held.values()) == {PLACES // 4}


def test_places_full_of_one_tenant_are_shared_with_another_and_the_first_come_stay() -> None:
    queue = Queue()
    for _ in range(PLACES):
        assert queue.come(Band.NORMAL, "alice") == []
    assert queue.come(Band.NORMAL, "alice") is None
    gone = [queue.come(Band.NORMAL, "bob") for _ in range(PLACES)]
    assert [one and one[0].call for one in gone] == [12, 11, 10, 9, 8, 7, *[None] * 6]
    assert queue.come(Band.LOW, "carol") is None
    high = queue.come(Band.HIGH, "alice", n=2)
    assert high is not None
    assert sorted(one.tenant for one in high) == ["alice", "bob"]  # of who has most, in turn


def test_the_least_urgent_go_first_and_whoever_comes_again_stays() -> None:
    queue = Queue()
    for band in (Band.LOW, Band.NORMAL):
        for _ in range(PLACES // 2 - 1):
            queue.come(band, "a")
    queue.add(One(0, 100, Band.LOW, "a", 2, again=True))
    found = [queue.come(Band.HIGH, "b") for _ in range(PLACES)]
    bands = [gone and gone[0].band for gone in found]
    assert bands == [*[Band.LOW] * 5, *[Band.NORMAL] * 5, None, None]


def test_a_call_leaves_as_a_whole_or_not_at_all() -> None:
    queue = Queue()
    queue.come(Band.LOW, "a", prompts=4)
    queue.come(Band.LOW, "a", prompts=8)
    queue.begun.add(2)
    gone = queue.come(Band.HIGH, "b")
    assert gone is not None
    assert [one.call for one in gone] == [1] * 4
    queue.begun.add(1)
    assert queue.come(Band.HIGH, "b", prompts=4) is None


@pytest.mark.parametrize("band", list(Band))
def test_an_empty_queue_gives_nobody(band: Band) -> None:
    assert who_makes_way(Waiting[One](), band, "a", 1, 1, lambda one: (one,)) is None
