"""What is foreseen for a request, by routing's knowledge and by the rule of thumb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from members import member, step_stats

from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Band, Expectation
from headrace.cluster.delivery import Delivery
from headrace.cluster.dispatch import Desk, Dispatch
from headrace.cluster.expectation import Naive, Predictive
from headrace.cluster.ledger import Ledger
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.cluster.registry import Member, Registry
from headrace.protocol.messages import Role, SequenceTimes
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim import Simulation, run


def registered(*members: Member) -> Registry:
    registry = Registry(GatewayOptions())
    for one in members:
        registry.register(one.info, one.channel, 0.0)
        registry._members[one.worker_id] = one
    return registry


def request(prompt: int = 10, priority: int = 0, model: str = "m", **sampling: int) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt=[1] * prompt,
        sampling=SamplingParams(**{"max_tokens": 100, **sampling}),
        model=model,
        priority=priority,
    )


class Line:
    """A queue in which so many wait."""

    def __init__(self, requests: int = 0) -> None:
        self._requests = requests

    def requests(self, model: str) -> int:
        return self._requests


def test_averages_begin_with_the_first_value_and_follow() -> None:
    one = member("w")
    one.ended(SequenceTimes(0.0, 2.0, 8.0))
    assert (one.prefill_s, one.decode_s) == (2.0, 8.0)
    one.ended(SequenceTimes(0.0, 4.0, None))
    assert (one.prefill_s, one.decode_s) == (3.0, 8.0)
    for _ in range(100):
        one.ended(SequenceTimes(0.0, 1.0, 1.0))
    assert one.prefill_s == pytest.approx(1.0, rel=0.02)
    assert one.decode_s == pytest.approx(1.0, rel=0.05)


def test_the_rule_of_thumb_is_queue_lengths_times_averages() -> None:
    prefill, decode = member("p", Role.PREFILL), member("d", Role.DECODE, max_num_seqs=8)
    prefill.told(step_stats(waiting=3), 0.0)
    decode.told(step_stats(waiting=2, running=8), 0.0)
    prefill.ended(SequenceTimes(0.0, 0.5, None))
    decode.ended(SequenceTimes(0.0, None, 4.0))
    naive = Naive(registered(prefill, decode), cast(Backlog, Line(5)))
    found = naive.expect([request()])
    assert found is not None
    assert found.ttft_s == pytest.approx((3 + 5) * 0.5 + (2 + 8) * 4.0 / 8)
    two = naive.expect([request(), request()])
    assert two is not None
    assert two.ttft_s == pytest.approx(found.ttft_s + 0.5)


def foreseen(members: Sequence[Member], *requests: GenerateRequest) -> Expectation:
    """By a gateway that has these workers, and in whose queue nobody waits."""
    found: list[Expectation | None] = []

    async def main(simulation: Simulation) -> None:
        world, ledger, observer = simulation.world("gateway"), Ledger(), GatewayObserver()
        options = GatewayOptions(split=SplitPolicy(prompt_length_threshold=64))
        registry = registered(*members)
        dispatch = Dispatch(world, options, registry, ledger, cast(Desk, None), lambda line: None)
        delivery = Delivery(world, observer, ledger, lambda accepted: None)
        backlog = Backlog(world, options, registry, ledger, dispatch, delivery, observer)
        found.append(Predictive(dispatch, backlog).expect(requests))

    run(main, max_virtual_s=1.0)
    assert found[0] is not None
    return found[0]


def test_prompts_of_one_call_are_computed_one_after_the_other() -> None:
    one = foreseen([member("w", max_num_seqs=64)], request(400))
    many = foreseen([member("w", max_num_seqs=64)], *[request(400)] * 24)
    assert many.ttft_s == pytest.approx(24 * one.ttft_s, rel=0.05)
    two = foreseen([member(name, max_num_seqs=64) for name in "ab"], *[request(400)] * 24)
    assert two.ttft_s == pytest.approx(12.5 * one.ttft_s, rel=0.05)


def test_samples_of_one_call_are_decoded_beside_each_other() -> None:
    server = [member("w", max_num_seqs=64)]
    one, wide = foreseen(server, request()), foreseen(server, request(n=32))
    assert wide.tpot_s == pytest.approx(one.tpot_s + 31 * one.row_s)
    assert foreseen(server, *[request()] * 32).tpot_s == pytest.approx(wide.tpot_s)
    both = [member(name, max_num_seqs=64) for name in "ab"]
    assert foreseen(both, *[request()] * 32).tpot_s == pytest.approx(one.tpot_s + 15 * one.row_s)
    assert foreseen(both, request(n=32)).tpot_s == pytest.approx(wide.tpot_s)  # which stay together


def test_samples_beyond_the_rows_wait_for_those_before_which_are_as_long_as_is_asked_for() -> None:
    server = [member("w", max_num_seqs=4)]  # an answer takes 5 s, where nothing is known
    assert foreseen(server, request(n=4)).ttft_s < 0.1
    long = foreseen(server, request(n=8, max_tokens=10_000))
    assert long.ttft_s == pytest.approx(5.0, rel=0.05)
    short = foreseen(server, request(n=8, max_tokens=100))
    assert short.ttft_s == pytest.approx(100 * short.tpot_s, rel=0.1)
    assert long.elsewhere_s == short.elsewhere_s == 0.0


def test_a_prompt_computed_elsewhere_waits_for_a_row_at_its_home() -> None:
    pools = [member("p", Role.PREFILL), member("d", Role.DECODE, max_num_seqs=2)]
    home = pools[1]
    free = foreseen(pools, request(300))
    assert free.ttft_s == pytest.approx(free.elsewhere_s)  # nothing of it is decoding's fault
    home.open_samples = 2
    full = foreseen(pools, request(300))
    assert full.ttft_s == pytest.approx(free.ttft_s + 2.5)  # one of two, which last 5 s
    assert full.elsewhere_s == pytest.approx(free.ttft_s)
    home.open_samples = 50
    assert foreseen(pools, request(300)).ttft_s == pytest.approx(free.ttft_s + 49 * 2.5)


def test_prompts_that_a_request_overtakes_at_a_worker_are_not_before_it() -> None:
    def ttft_s(priority: int) -> float:
        worker = member("w", max_num_seqs=64)
        for name in ("one", "two", "three"):
            worker.expect(name, 1000, Band.LOW)
        return foreseen([worker], request(100, priority)).ttft_s

    alone, behind, before = foreseen([member("w")], request(100)).ttft_s, ttft_s(1), ttft_s(0)
    assert behind == pytest.approx(31 * alone)
    assert before == pytest.approx(11 * alone)  # one of them may have been begun


def test_a_worker_forgets_prompts_that_are_computed_or_not_wanted() -> None:
    worker = member("w")
    worker.expect("one", 1000, Band.LOW)
    worker.expect("two", 1000, Band.LOW)
    worker.has_seen("one")
    assert len(worker.outstanding) == 2  # it is there, and not computed
    worker.leaves("one")
    worker.leaves("two")
    worker.leaves("two")
    assert not len(worker.outstanding)
