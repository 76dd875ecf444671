"""When a worker may be given more, what comes of more urgent classes, and what a wait is foreseen to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from members import member, step_stats

from headrace.cluster import prediction
from headrace.cluster.classes import Band
from headrace.cluster.credit import credit_of, has_credit
from headrace.cluster.demand import MEMORY_S, Demand
from headrace.cluster.facts import Fact, Table, table_of
from headrace.cluster.registry import Member
from headrace.cluster.waiting import Ahead, Needs
from headrace.protocol.messages import Role


def table(*members: Member) -> Table:
    return table_of([one.facts for one in members])


def credited(facts: Table, *, reserve: bool = False, steps: float = 2.0) -> str:
    """The first letters of the classes that may come."""
    bands = [b for b in Band if has_credit(facts, b, steps, reserve=reserve).any()]
    return "".join(band[0] for band in bands)


def test_a_worker_has_enough_when_prompts_of_some_steps_wait_there() -> None:
    """Steps of 100 tokens."""
    found = {queued: credited(table(member("w", queued=queued))) for queued in (199, 200, 299, 300, 399, 400)}
    assert found == {199: "hnl", 200: "hn", 299: "hn", 300: "h", 399: "h", 400: ""}
    on_its_way = member("w", queued=150)
    on_its_way.expect("leg", 50, Band.NORMAL)
    assert credited(table(on_its_way)) == "hn"
    assert credited(table(member("w", queued=10_000)), steps=math.inf) == "hnl"


def test_a_worker_has_enough_when_sequences_wait_for_rows() -> None:
    """8 rows, and one that may wait for each class and those below."""
    found = {count: credited(table(member("w", open_samples=count))) for count in (8, 9, 10, 11)}
    assert found == {8: "hnl", 9: "hn", 10: "h", 11: ""}


def test_a_share_is_kept_where_more_urgent_requests_come() -> None:
    assert credited(table(member("w", open_samples=6)), reserve=True) == "hnl"
    assert credited(table(member("w", open_samples=7)), reserve=True) == ""
    full = member("w")
    full.told(step_stats(blocks_held=880), 0.0)
    assert credited(table(full)) == "hnl"
    assert credited(table(full), reserve=True) == ""
    assert (
        credited(table(member("w", max_num_seqs=1)), reserve=True) == "hnl"
    )  # a single row cannot be shared


def test_what_fits_is_a_question_of_room_home_and_prefill() -> None:
    homes = table(member("d", Role.DECODE, open_samples=3))
    busy, idle = member("p", Role.PREFILL, queued=1000), member("q", Role.PREFILL)
    found = credit_of(homes, table(busy), 2.0, [Band.LOW])
    assert found.fits(Band.LOW, Needs(105))
    assert not found.fits(Band.LOW, Needs(106))  # 108 in all
    assert not found.fits(Band.HIGH, Needs(1, prefill=True))
    assert credit_of(homes, table(busy, idle), 2.0, []).fits(Band.HIGH, Needs(1, prefill=True))
    assert credit_of(homes, table(), 2.0, []).fits(Band.HIGH, Needs(1, prefill=True))  # at home then
    assert not credit_of(table(), table(), 2.0, []).fits(Band.HIGH, Needs())


def test_room_at_one_worker_and_credit_at_another_are_no_place() -> None:
    wide = member("a", max_num_seqs=8, max_waiting=2, queued=1000)
    quick = member("b", max_num_seqs=8, max_waiting=2, open_samples=7)
    found = credit_of(table(wide, quick), table(), 2.0, [])
    assert found.fits(Band.NORMAL, Needs(3))
    assert not found.fits(Band.NORMAL, Needs(4))  # so who asks for fewer goes before it


def test_demand_is_a_rate_of_the_more_urgent_and_fades() -> None:
    demand = Demand()
    for i in range(400):
        demand.came(Band.HIGH, 100.0, 2, 0.25 * i)
        demand.came(Band.NORMAL, 10.0, 1, 0.25 * i)
    normal, low = demand.more_urgent(Band.NORMAL, 100.0), demand.more_urgent(Band.LOW, 100.0)
    assert (normal.tokens, normal.samples) == (pytest.approx(400, rel=0.02), pytest.approx(8, rel=0.02))
    assert (low.tokens, low.samples) == (pytest.approx(440, rel=0.02), pytest.approx(12, rel=0.02))
    assert demand.more_urgent(Band.HIGH, 100.0).samples == 0
    assert demand.more_urgent(Band.LOW, 100.0 + MEMORY_S).samples == pytest.approx(12 / math.e, rel=0.1)
    assert demand.more_urgent(Band.LOW, 1000.0).samples == 0  # and no reserve is kept for nobody


def test_the_rate_is_right_before_the_memory_is_full() -> None:
    demand = Demand()
    for i in range(40):
        demand.came(Band.HIGH, 100.0, 1, 0.25 * i)
    assert demand.more_urgent(Band.LOW, 10.0).tokens == pytest.approx(400, rel=0.05)


def test_the_wait_behind_others_is_their_work_at_the_rate_of_all() -> None:
    one, other = member("a"), member("b")
    both = table(one, other)
    per_s = float(prediction.prefill_tokens_per_s(both).sum())
    assert prediction.computed_in_s(both, 0.0) == 0.0
    assert prediction.computed_in_s(both, 3 * per_s) == pytest.approx(3.0)
    # 16 rows, and a sequence lasts 5 s where nothing is known: 3.2 rows a second come free.
    assert prediction.rows_in_s(both, 6.4) == pytest.approx(2.0)
    assert prediction.rows_in_s(both, -1.0) == 0.0


def test_a_wait_is_longer_for_what_overtakes_it() -> None:
    facts = table(member("a"))
    per_s = float(prediction.prefill_tokens_per_s(facts).sum())

    def wait_s(share: float, prompts_per_s: float) -> float:
        ahead = Ahead(overtaking_per_s=share * per_s, joining_per_s=prompts_per_s)
        return prediction.overtaken_s(facts, 3.0, ahead)

    assert prediction.overtaken_s(facts, 3.0, Ahead()) == 3.0
    assert wait_s(0.5, 1e9) == pytest.approx(6.0, rel=1e-3)  # of many short ones it is certain how long
    assert wait_s(0.5, 2.0) == pytest.approx(6.0 + prediction.SURE * math.sqrt(3.0 * 0.5 * 0.25 / 0.125))
    assert wait_s(2.0, 1e9) == pytest.approx(3.0 * prediction.MOST_STRETCH, rel=1e-3)


def test_urgent_requests_that_will_be_there_are_counted_once() -> None:
    facts = table(member("a", open_samples=4), member("b", open_samples=2))
    assert prediction.joined(facts, 0.0, 0) is facts
    # 2 a second that last 5 s: 10, of which 4 are there.
    found = prediction.joined(facts, 2.0, 4)
    assert np.array_equal(found[:, Fact.OPEN_SAMPLES] - facts[:, Fact.OPEN_SAMPLES], [3.0, 3.0])
    assert np.array_equal(prediction.joined(facts, 2.0, 12), facts)
