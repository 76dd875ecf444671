"""Where a request goes, policy by policy, and that each choice can be read back."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from members import KEY, member, step_stats

from headrace.cluster.classes import Band
from headrace.cluster.holdings import Holdings, Prompt
from headrace.cluster.options import RoutingOptions
from headrace.cluster.placement import every
from headrace.cluster.registry import Member
from headrace.cluster.routing import Candidates, Decision, Policy, Router, Terms, Wish
from headrace.cluster.routing.policies import POLICIES
from headrace.cluster.routing.sessions import Sessions
from headrace.engine.identity import BlockHasher
from headrace.protocol.messages import KVSnapshot

PROMPT = list(range(1, 402))


def wish(session: str = "", tokens: int = len(PROMPT)) -> Wish:
    return Wish("r", tokens, 16, 1, session)


class House:
    """A router over some members, of which some hold the prompt."""

    def __init__(self, *members: Member, holds: dict[str, int] | None = None, **options: Any) -> None:
        self.members = list(members)
        self.said: list[str] = []
        holdings = Holdings(KEY, b"guess")
        hasher = BlockHasher(KEY, b"fp", 4)
        chain = hasher.chain(hasher.root(""), PROMPT)
        for one in members:
            holdings.joined(one)
            blocks = (holds or {}).get(one.worker_id, 0) // 4
            holdings.snapshot(one, KVSnapshot(1, chain[:blocks]))
        self.router = Router(RoutingOptions(**options), holdings, random.Random(1), self.said.append)

    def choose(self, session: str = "", purpose: str = "decode") -> Decision:
        among = self.router.candidates(every(self.members), wish(session), Prompt(PROMPT, ""), now=1.0)
        chosen, decision = self.router.choose(among, purpose=purpose)
        assert chosen.worker_id == decision.worker
        return decision


def test_a_prompt_goes_where_it_is_cached() -> None:
    house = House(member("a"), member("b"), member("c"), holds={"b": 400})
    assert house.choose().worker == "b"


@pytest.mark.parametrize(("queued", "chosen"), [(200, "a"), (600, "b")])
def test_until_the_queue_there_costs_more_than_computing_it_elsewhere(queued: int, chosen: str) -> None:
    house = House(member("a", queued=queued), member("b"), holds={"a": 400})
    assert house.choose().worker == chosen


def test_prompts_on_their_way_count_as_queued() -> None:
    a, b = member("a"), member("b")
    a.expect("one", 500, Band.NORMAL)
    assert House(a, b).choose().worker == "b"


def test_what_decodes_already_counts_as_well() -> None:
    assert House(member("a", open_samples=4), member("b", open_samples=3)).choose().worker == "b"
    full = member("a")
    full.told(step_stats(blocks_held=900), 0.0)
    assert House(full, member("b")).choose().worker == "b"


def test_too_small_a_cached_share_is_no_reason() -> None:
    busier = member("a", queued=30)
    house = House(busier, member("b"), holds={"a": 100}, min_cache_hit_ratio=0.75)
    assert house.choose().worker == "b"
    assert House(busier, member("b"), holds={"a": 100}).choose().worker == "a"


def test_a_whole_cached_share_is_that_of_all_full_blocks() -> None:
    # 100 blocks can be held of 401 tokens.
    busier = member("a", queued=30)
    assert House(busier, member("b"), holds={"a": 400}, min_cache_hit_ratio=1.0).choose().worker == "a"
    assert House(busier, member("b"), holds={"a": 396}, min_cache_hit_ratio=1.0).choose().worker == "b"


def test_a_popular_prefix_spreads_when_its_holder_is_busier_than_the_others() -> None:
    def house(**options: Any) -> House:
        busy, *others = member("a"), member("b"), member("c")
        for _ in range(100):
            busy.told(step_stats(rows=1, tokens=1, step_s=0.05), 1.0)
        for other in others:
            other.told(step_stats(rows=1, tokens=1, step_s=0.5), 1.0)
        return House(busy, *others, holds={"a": 400}, **options)

    assert house().choose().worker in ("b", "c")
    assert house(hotspot_prevention=False).choose().worker == "a"


def test_a_weight_of_nothing_takes_a_term_out() -> None:
    house = House(member("a", queued=50), member("b"), holds={"b": 400}, prefix_cache_weight=0.0)
    assert house.choose().worker == "b"
    house = House(member("a"), member("b", queued=50), holds={"b": 400}, prefix_cache_weight=0.0)
    assert house.choose().worker == "a"


def test_a_session_stays_where_it_went_while_others_are_hardly_better() -> None:
    a, b = member("a"), member("b")
    house = House(a, b)
    assert house.choose("s").worker == "a"  # by name
    a.told(step_stats(queued_tokens=4), 0.0)  # of 100 in a full step
    decision = house.choose("s")
    assert decision.worker == "a"
    assert {one.worker: one.terms["affinity"] for one in decision.considered()} == {"a": 0.0, "b": 0.05}
    assert house.choose("another").worker == "b"
    assert house.choose("").worker == "b"
    assert "affinity" not in house.choose("").terms
    a.told(step_stats(queued_tokens=6), 0.0)
    assert house.choose("s").worker == "b"
    a.told(step_stats(queued_tokens=0), 0.0)
    b.told(step_stats(queued_tokens=3), 0.0)
    assert house.choose("s").worker == "b"  # where it went last


def test_without_weight_or_session_nothing_is_changed_by_affinity() -> None:
    for options, session in (({"affinity_weight": 0.0}, "s"), ({}, "")):
        a = member("a")
        house = House(a, member("b"), **options)
        assert house.choose(session).worker == "a"
        a.told(step_stats(queued_tokens=1), 0.0)
        assert house.choose(session).worker == "b"


def test_a_session_has_one_home_and_one_prefill_worker() -> None:
    homes, prefills = House(member("d0"), member("d1")), House(member("p0"), member("p1"))
    prefills.router = homes.router
    homes.choose("s")
    prefills.choose("s", purpose="prefill")
    for house, purpose in ((homes, "decode"), (prefills, "prefill")):
        house.members[0].told(step_stats(queued_tokens=3), 0.0)
        assert house.choose("s", purpose=purpose).worker == house.members[0].worker_id


def test_a_worker_that_was_started_again_is_another_one() -> None:
    sessions, a, b = Sessions(), member("a"), member("b")
    sessions.went("s", b)
    assert sessions.last("s", [a, b]) == 1
    assert sessions.last("s", [a]) is None
    b.info = msgspec.structs.replace(b.info, generation=2)
    assert sessions.last("s", [a, b]) is None
    sessions.went("", a)
    assert (len(sessions), sessions.last("", [a])) == (1, None)


def test_the_sessions_that_were_silent_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.cluster.routing.sessions.KEPT", 2)
    sessions, a = Sessions(), member("a")
    for session in ("x", "y", "x", "z" * 10**5):
        sessions.went(session, a)
    assert len(sessions) == 2
    assert [sessions.last(session, [a]) for session in ("x", "y", "z" * 10**5)] == [0, None, 0]


# ---- the other policies --------------------------------------------------------------------------------


def many(**options: Any) -> House:
    return House(*(member(f"w{i}", open_samples=i % 3) for i in range(6)), **options)


def test_random_goes_everywhere_and_a_seed_goes_the_same_way_again() -> None:
    def drawn() -> list[str]:
        house = many(policy="random")
        return [house.choose().worker for _ in range(300)]

    first = drawn()
    assert first == drawn()
    assert min(Counter(first).values()) > 20


def test_round_robin_takes_turns_also_when_somebody_leaves() -> None:
    house = many(policy="round_robin")
    assert [house.choose().worker for _ in range(7)] == ["w0", "w1", "w2", "w3", "w4", "w5", "w0"]
    house.members = house.members[2:]
    assert [house.choose().worker for _ in range(2)] == ["w2", "w3"]


def test_round_robin_takes_turns_for_each_purpose() -> None:
    """Those that prefill have other names than those that decode, and their turns come in between."""
    homes, prefills = (
        House(*(member(f"{role}{i}") for i in range(3)), policy="round_robin") for role in ("d", "p")
    )
    prefills.router = homes.router
    pairs = [(homes.choose().worker, prefills.choose(purpose="prefill").worker) for _ in range(4)]
    assert pairs == [("d0", "p0"), ("d1", "p1"), ("d2", "p2"), ("d0", "p0")]


def test_least_loaded_takes_the_least_loaded_and_among_equals_the_first_by_name() -> None:
    assert many(policy="least_loaded").choose().worker == "w0"


def test_prompts_that_are_prefilled_for_others_are_load() -> None:
    busy = member("a")
    busy.exports = 2
    assert House(busy, member("b", open_samples=1), policy="least_loaded").choose().worker == "b"


def test_power_of_two_never_takes_the_worse_of_two() -> None:
    house = House(member("a", open_samples=7), member("b"), policy="power_of_two")
    assert {house.choose().worker for _ in range(20)} == {"b"}
    counted = Counter(many(policy="power_of_two").choose().worker for _ in range(1))
    assert counted.total() == 1
    alone = House(member("a"), policy="power_of_two")
    assert alone.choose().worker == "a"


def test_prefix_goes_where_most_is_cached_whatever_waits_there() -> None:
    house = House(member("a", queued=9000), member("b"), holds={"a": 40, "b": 20}, policy="prefix")
    assert house.choose().worker == "a"


@given(sessions=st.lists(st.text(min_size=1), min_size=1, max_size=20), gone=st.integers(0, 5))
def test_a_session_stays_and_when_a_worker_leaves_only_its_own_sessions_move(
    sessions: list[str], gone: int
) -> None:
    house = many(policy="session")
    before = {session: house.choose(session).worker for session in sessions}
    assert before == {session: house.choose(session).worker for session in sessions}
    left = house.members.pop(gone).worker_id
    for session, worker in before.items():
        assert (house.choose(session).worker == worker) == (worker != left)


def measured(name: str, tokens_per_s: float, queued: int = 0) -> Member:
    made = member(name, queued=queued)
    for tokens in range(1, 200):
        made.told(
            step_stats(rows=1, tokens=tokens, sampled=tokens, step_s=0.001 + tokens / tokens_per_s), 0.5
        )
    made.told(step_stats(queued_tokens=queued), 0.0)
    return made


def test_capacity_waits_for_the_faster_queue() -> None:
    house = House(measured("slow", 1e3, queued=100), measured("fast", 1e4, queued=500), policy="capacity")
    assert house.choose().worker == "fast"


def test_latency_predicts_and_weighs_speed_cache_and_queue() -> None:
    slow, fast = measured("slow", 1e3), measured("fast", 1e4, queued=2000)
    assert House(slow, fast, policy="latency").choose().worker == "fast"
    assert House(slow, fast, holds={"slow": 400}, policy="latency").choose().worker == "slow"


# ---- one's own -----------------------------------------------------------------------------------------


class Last(Policy):
    """The last by name."""

    def terms(self, among: Candidates) -> Terms:
        return {"from the end": np.arange(len(among), 0, -1.0)}


class Broken(Policy):
    def terms(self, among: Candidates) -> Terms:
        raise ZeroDivisionError("no idea")


class Shapeless(Policy):
    def terms(self, among: Candidates) -> Terms:
        return {"one for all": np.zeros(1)}


class Nobody(Policy):
    def terms(self, among: Candidates) -> Terms:
        return {"never": np.full(len(among), np.inf)}


def test_a_policy_of_ones_own_is_named_by_module_and_class() -> None:
    assert many(policy=f"{__name__}:Last").choose().worker == "w5"


@pytest.mark.parametrize("name", ["Broken", "Shapeless", "Nobody"])
def test_one_that_fails_costs_no_request_and_is_told_of_once(name: str) -> None:
    house = many(policy=f"{__name__}:{name}")
    decision = house.choose()
    house.choose()
    assert decision.worker == "w0"
    assert "failed" in decision.rule
    assert len(house.said) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cheapest", "there is no routing policy"),
        ("nowhere:At", "cannot be imported"),
        ("math:pi", "is no routing policy"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        many(policy=name)


# ---- explained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_decision_shows_all_candidates_and_terms_that_add_up(policy: str) -> None:
    decision = many(policy=policy).choose("session")
    considered = decision.considered()
    assert [one.chosen for one in considered] == [True] + [False] * 5
    assert {one.worker for one in considered} == {f"w{i}" for i in range(6)}
    for one in considered:
        assert one.score == pytest.approx(sum(one.terms.values()))
        assert one.score >= considered[0].score
        assert one.ttft_s > 0.0
        assert one.age_s == 1.0
    assert policy in decision.rule
