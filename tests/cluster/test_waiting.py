"""The order in which those who wait go on: strict bands, fair turns, and nobody held back without need."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.classes import Band
from headrace.cluster.waiting import Ahead, Needs, Place, Waiting

BANDS = list(Band)


@dataclass(frozen=True)
class One:
    name: int
    place: Place
    again: bool = False


def anything(band: Band, needs: Needs) -> bool:
    return True


def places() -> st.SearchStrategy[Place]:
    return st.builds(
        Place,
        band=st.sampled_from(BANDS),
        tenant=st.sampled_from("abc"),
        cost=st.integers(1, 50),
        tokens=st.integers(0, 50),
        samples=st.integers(1, 3),
        needs=st.builds(Needs, samples=st.integers(1, 3), prefill=st.booleans()),
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), places(), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("serve"), st.integers(0, 3), st.booleans()),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_the_next_is_of_the_most_urgent_band_that_fits_and_the_first_of_its_tenant(steps: list) -> None:
    line: Waiting[One] = Waiting()
    there: list[One] = []
    for number, step in enumerate(steps):
        match step:
            case ("add", place, again):
                one = One(number, place, again)
                line.add(one, place, again=again)
                there.append(one)
            case ("remove", which):
                gone = there.pop(which % len(there)) if there else One(-1, Place(Band.LOW))
                line.remove(gone)
            case ("serve", most, prefill):

                def fits(band: Band, needs: Needs, most: int = most, prefill: bool = prefill) -> bool:
                    return needs.samples <= most and (prefill or not needs.prefill)

                fitting = [one for one in there if fits(one.place.band, one.place.needs)]
                served = line.first(fits)
                if served is None:
                    assert not fitting
                    continue
                band = min(BANDS.index(one.place.band) for one in fitting)
                rivals = [one for one in fitting if one.place.band is BANDS[band]]
                rivals = [one for one in rivals if one.again] or rivals
                assert served in rivals
                if not served.again:
                    rivals = [one for one in rivals if one.place.tenant == served.place.tenant]
                assert served == rivals[0]
                line.serve(served)
                there.remove(served)
        assert len(line) == len(there)
        assert list(line) == sorted(there, key=lambda one: BANDS.index(one.place.band))
        assert line.samples == sum(one.place.samples for one in there)
        everybody = line.ahead(Place(Band.LOW, "a", cost=1e9))
        assert everybody.tokens == pytest.approx(sum(one.place.tokens for one in there))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_tenants_that_wait_all_the_while_get_the_same_but_for_their_largest(seed: int, tenants: int) -> None:
    chance = random.Random(seed)
    most = {f"t{i}": chance.choice([1, 10, 200]) for i in range(tenants)}
    line: Waiting[int] = Waiting()
    costs: dict[int, tuple[str, int]] = {}
    numbers = itertools.count()
    left: Counter[str] = Counter()

    def more(tenant: str, cost: int) -> None:
        number = next(numbers)
        costs[number] = tenant, cost
        line.add(number, Place(Band.NORMAL, tenant, cost=cost))
        left[tenant] += 1

    served: list[tuple[str, int]] = []
    for _ in range(300):
        for tenant in most:
            while left[tenant] < 2:
                more(tenant, chance.randint(1, most[tenant]))
        if chance.random() < 0.3:  # who comes now and then changes nothing between the others
            more("visitor", chance.randint(1, 300))
        number = line.first(anything)
        assert number is not None
        line.serve(number)
        tenant, cost = costs[number]
        left[tenant] -= 1
        served.append((tenant, cost))
    for one, other in itertools.combinations(most, 2):
        lead, leads = 0, [0]
        for tenant, cost in served:
            lead += cost if tenant == one else -cost if tenant == other else 0
            leads.append(lead)
        assert max(leads) - min(leads) <= most[one] + most[other]


def order(line: Waiting[str]) -> str:
    found = ""
    while (name := line.first(anything)) is not None:
        line.serve(name)
        found += name
    return found


def queue(*names: str, **cost: float) -> Waiting[str]:
    """Items are called by their tenant and a digit."""
    line: Waiting[str] = Waiting()
    for name in names:
        line.add(name, Place(Band.NORMAL, name[0], cost=cost.get(name[0], 1.0)))
    return line


def test_who_comes_late_goes_before_what_another_has_queued() -> None:
    line = queue("a1", "a2", "a3", "a4")
    assert line.first(anything) == "a1"
    line.serve("a1")
    line.add("b1", Place(Band.NORMAL, "b"))
    assert order(line) == "b1a2a3a4"


def test_time_without_requests_is_no_credit() -> None:
    line = queue("a1", "a2", "a3", "a4")
    for name in ("a1", "a2"):
        line.serve(name)
    for name in ("b1", "b2", "b3"):
        line.add(name, Place(Band.NORMAL, "b"))
    assert order(line) == "b1a3b2a4b3"


def test_costly_requests_have_fewer_turns() -> None:
    assert order(queue("a1", "b1", "a2", "b2", "b3", "b4", a=3.0)) == "a1b1b2b3a2b4"


def test_leaving_and_coming_back_gains_nothing() -> None:
    line = queue("a1", "b1", "b2", "b3", a=3.0)
    line.serve("a1")
    line.add("a2", Place(Band.NORMAL, "a"))
    assert order(line) == "b1b2b3a2"


def test_what_left_is_not_charged() -> None:
    line = queue("a1", "a2", "b1", "b2", a=100.0)
    line.remove("a1")
    assert order(line) == "a2b1b2"


def test_who_comes_again_goes_first_in_its_band() -> None:
    line = queue("a1")
    line.add("x1", Place(Band.LOW), again=True)
    line.add("y1", Place(Band.NORMAL), again=True)
    line.add("z1", Place(Band.HIGH))
    assert order(line) == "z1y1a1x1"


def test_what_is_ahead_is_all_that_is_more_urgent_and_a_turn_of_each_tenant() -> None:
    line: Waiting[int] = Waiting()
    for number in range(10):
        line.add(number, Place(Band.NORMAL, "busy", cost=100, tokens=80))
    line.add(10, Place(Band.HIGH, "busy", cost=1, tokens=7))
    line.add(11, Place(Band.LOW, "busy", cost=1, tokens=5))
    light = Place(Band.NORMAL, "light", cost=50)
    assert line.ahead(light) == Ahead(7 + 40, 1 + 0.5)
    assert line.ahead(Place(Band.NORMAL, "busy", cost=50)) == Ahead(7 + 800, 11)
    assert line.ahead(Place(Band.HIGH, "light", cost=50)) == Ahead(7, 1)
    assert [line.is_first(band) for band in BANDS] == [False, False, False]
    line.remove(10)
    assert [line.is_first(band) for band in BANDS] == [True, False, False]


def test_who_waits_already_is_told_apart() -> None:
    with pytest.raises(ValueError, match="waits already"):
        queue("a1", "a1")


def test_a_full_queue_of_many_tenants_is_quick() -> None:
    """10,000 that wait, each of its own tenant: what is looked at per item does not grow with them."""
    looked = 0

    def fits(band: Band, needs: Needs) -> bool:
        nonlocal looked
        looked += 1
        return True

    line: Waiting[int] = Waiting()
    for number in range(10_000):
        line.add(number, Place(BANDS[number % 3], f"t{number}"))
    for _ in range(10_000):
        number = line.first(fits)
        assert number is not None
        line.serve(number)
    assert not line
    assert looked <= 40_000
