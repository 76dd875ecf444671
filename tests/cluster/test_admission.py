"""Who is accepted, with what, and what the others are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from headrace.cluster.admission import Admission, Band
from headrace.cluster.classes import Expectation
from headrace.cluster.expectation import Foresight
from headrace.cluster.options import AdmissionOptions, DegradeStep, ServiceLevels
from headrace.engine.limits import RequestRefused
from headrace.protocol.requests import ErrorCode, GenerateRequest, SamplingParams

SLO = ServiceLevels(ttft_s=0.2, tpot_s=0.05)
LADDER = (DegradeStep(lower="n", to=1, above=0.5), DegradeStep(lower="max_tokens", to=64, above=0.8))
STRICT = {"early_rejection": True, "reject_on_slo_violation": True, "low_priority_threshold_s": 0.1}


def request(priority: int = 0, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 500, "n": 4, **sampling})
    return GenerateRequest(request_id="r", prompt=[1, 2, 3], sampling=params, priority=priority)


class Foreseen(Foresight):
    """Each sample that is asked for costs so much."""

    def __init__(
        self, ttft_s: float, tpot_s: float = 0.01, per_sample_s: float = 0.0, elsewhere_s: float = 0.0
    ) -> None:
        self._ttft_s, self._tpot_s, self._per_sample_s = ttft_s, tpot_s, per_sample_s
        self._elsewhere_s = elsewhere_s
        self.asked = 0

    def expect(self, requests: Sequence[GenerateRequest]) -> Expectation:
        self.asked += 1
        samples = sum(request.sampling.n for request in requests)
        return Expectation(
            self._ttft_s + self._per_sample_s * samples,
            self._tpot_s,
            elsewhere_s=self._elsewhere_s,
            beside=10.0,
            row_s=0.01,
            lasts_s=4.0,
        )


def admission(foresight: Foresight, **options: Any) -> Admission:
    return Admission(AdmissionOptions(**options), SLO, foresight)


def test_bands_are_told_by_the_sign_of_the_priority() -> None:
    assert [Band.of(priority) for priority in (-5, 0, 3)] == [Band.HIGH, Band.NORMAL, Band.LOW]


@pytest.mark.parametrize(
    ("priority", "ttft_s", "tpot_s", "says"),
    [
        (0, 0.19, 0.04, None),
        (0, 0.21, 0.04, "first token would take about 210 ms"),
        (0, 0.01, 0.06, "^each further token would take about 60 ms"),
        (1, 0.09, 0.06, None),  # who has time may be slow
        (1, 0.11, 0.01, "low priority is accepted up to 100 ms"),
        (-1, 99.0, 9.0, None),
    ],
)
def test_each_class_is_held_to_its_own_limit(
    priority: int, ttft_s: float, tpot_s: float, says: str | None
) -> None:
    doors = admission(Foreseen(ttft_s, tpot_s), **STRICT)
    if says is None:
        assert doors.admit([request(priority)]).requests == (request(priority),)
        return
    with pytest.raises(RequestRefused, match=says) as refused:
        doors.admit([request(priority)])
    assert refused.value.error.code is ErrorCode.OVERLOADED


def test_who_is_refused_is_told_when_it_would_be_served() -> None:
    with pytest.raises(RequestRefused) as refused:
        admission(Foreseen(4.5), **STRICT).admit([request()])
    assert refused.value.error.retry_after_s == 5


@pytest.mark.parametrize(
    "options", [{}, {"early_rejection": True}, {"reject_on_slo_violation": True}], ids=str
)
def test_a_normal_request_is_refused_only_where_that_is_asked_for(options: dict[str, bool]) -> None:
    assert not admission(Foreseen(99.0), **options).admit([request()]).degraded


def test_without_anything_to_decide_nothing_is_foreseen() -> None:
    foresight = Foreseen(99.0)
    admission(foresight).admit([request()])
    admission(foresight, **STRICT).admit([request(-1)])
    assert foresight.asked == 0


def test_steps_of_the_ladder_are_taken_while_they_are_needed() -> None:
    def taken(ttft_s: float, per_sample_s: float = 0.0, priority: int = 0) -> tuple[str, ...]:
        foresight = Foreseen(ttft_s, per_sample_s=per_sample_s)
        return admission(foresight, degrade=LADDER).admit([request(priority)]).degraded

    assert taken(0.09) == ()
    assert taken(0.12) == ("n=1",)
    assert taken(0.17) == ("n=1", "max_tokens=64")
    assert taken(0.02, per_sample_s=0.04) == ("n=1",)  # which was enough
    assert taken(0.17, priority=-1) == ()


def test_a_degraded_request_is_what_it_says() -> None:
    doors = admission(Foreseen(0.17), degrade=LADDER)
    (lower,) = doors.admit([request(min_tokens=100)]).requests
    assert (lower.sampling.n, lower.sampling.max_tokens, lower.sampling.min_tokens) == (1, 64, 64)
    modest = request(n=1, max_tokens=10)
    assert doors.admit([modest]).requests == (modest,)
    assert doors.admit([modest]).degraded == ()


def test_a_step_that_makes_it_fit_saves_it_from_being_refused() -> None:
    doors = admission(Foreseen(0.1, per_sample_s=0.04), degrade=LADDER, **STRICT)
    assert doors.admit([request()]).degraded == ("n=1",)
    with pytest.raises(RequestRefused):
        admission(Foreseen(0.1, per_sample_s=0.04), **STRICT).admit([request()])


def test_all_that_a_client_asks_for_in_one_call_is_foreseen_together() -> None:
    class Long(Foresight):
        def expect(self, requests: Sequence[GenerateRequest]) -> Expectation:
            return Expectation(0.01 * sum(len(request.prompt) for request in requests), 0.0)

    doors = admission(Long(), **STRICT)
    assert len(doors.admit([request()] * 6).requests) == 6
    with pytest.raises(RequestRefused, match="about 210 ms"):
        doors.admit([request()] * 7)


def test_a_step_whose_pressure_is_not_reached_keeps_no_other_from_being_taken() -> None:
    unordered = (
        DegradeStep(lower="n", to=1, above=0.9),
        DegradeStep(lower="max_tokens", to=64, above=0.5),
    )
    assert admission(Foreseen(0.12), degrade=unordered).admit([request()]).degraded == ("max_tokens=64",)
    assert admission(Foreseen(0.19), degrade=unordered).admit([request()]).degraded == (
        "n=1",
        "max_tokens=64",
    )


def test_whose_own_prompt_takes_too_long_is_not_told_to_wait_for_others() -> None:
    class Long(Foresight):
        def expect(self, requests: Sequence[GenerateRequest]) -> Expectation:
            return Expectation(4.5, 0.0, own_s=0.21)

    with pytest.raises(RequestRefused, match=r"its own prompts take 210 ms.* try again in 60 s"):
        admission(Long(), **STRICT).admit([request()])


def test_nothing_is_taken_for_a_wait_that_it_cannot_shorten() -> None:
    ladder = (*LADDER, DegradeStep(lower="n", to=2, above=0.1))
    doors = admission(Foreseen(0.17, elsewhere_s=0.13), degrade=ladder)
    assert doors.admit([request()]).degraded == ("n=2",)  # for the 40 ms of 200 where it is decoded


def test_who_finds_too_much_decoded_comes_again_when_enough_of_it_has_ended() -> None:
    with pytest.raises(RequestRefused) as refused:
        admission(Foreseen(0.01, tpot_s=0.095), **STRICT).admit([request()])
    # Each row takes 10 ms: 5 of the 10 beside must end, which last 4 s.
    assert refused.value.error.retry_after_s == math.ceil(4 * math.log(2))
    with pytest.raises(RequestRefused, match=r"nobody else served.* try again in 60 s"):  # which is the most
        admission(Foreseen(0.01, tpot_s=1.0), **STRICT).admit([request()])


def test_nobody_there_to_foresee_for_is_no_reason_to_refuse() -> None:
    class Blind(Foresight):
        def expect(self, requests: Sequence[GenerateRequest]) -> None:
            return None

    assert admission(Blind(), **STRICT).admit([request()]).requests == (request(),)
