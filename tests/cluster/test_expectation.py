"""What is foreseen for a request, by routing's knowledge and by the rule of thumb."""

from __future__ import annotations

from typing import cast

import pytest
from members import member, step_stats

from headrace.cluster.backlog import Backlog
from headrace.cluster.expectation import Naive
from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import Member, Registry
from headrace.protocol.messages import Role, SequenceTimes
from headrace.protocol.requests import GenerateRequest, SamplingParams


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
    found = naive.expect(request())
    assert found is not None
    assert found.ttft_s == pytest.approx((3 + 5) * 0.5 + (2 + 8) * 4.0 / 8)
