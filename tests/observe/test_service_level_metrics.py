"""What is judged of requests, by class, and what windows tell of it; exact under the virtual clock."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.cluster.classes import Band, Refusal, Slo, WouldWait
from headrace.cluster.options import AdmissionOptions, DegradeStep, GatewayOptions, ServiceLevels
from headrace.cluster.registry import MemberState
from headrace.engine.limits import RequestRefused
from headrace.observe import Metrics
from headrace.observe.metrics import PREFIX
from headrace.observe.service_levels import SLOT_S, ServiceRecord
from headrace.protocol.requests import ErrorCode, GenerateRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

import house as houses
from house import EngineShape, House, collect, in_house

STEP_S = 0.01
OPTIONS = GatewayOptions(
    slo=ServiceLevels(ttft_s=0.015, tpot_s=0.015, objective=0.9),
    admission=AdmissionOptions(low_priority_threshold_s=0.5),
)
"""A request that is computed at once holds all limits; one that waits for another's ten steps holds only that
of low priority."""


def request(name: str, *, priority: int = 0, **sampling: Any) -> GenerateRequest:
    return msgspec.structs.replace(houses.request(name, **sampling), priority=priority)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Told:
    """Labelled values of a page."""

    metrics: Metrics
    options: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """By the values of labels that are not given, these in the order of their names: what is not 0."""
        found: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(self.metrics.text().decode()):
            for sample in family.samples:
                rest = {key: value for key, value in sample.labels.items() if key != "model_name"}
                if sample.name == PREFIX + name and sample.value and labels.items() <= rest.items():
                    key = tuple(value for label, value in rest.items() if label not in labels)
                    found[key] = sample.value
        return found


def judged(
    body: Callable[[House, Told], Awaitable[None]],
    options: GatewayOptions = OPTIONS,
    *,
    max_num_seqs: int = 1,
) -> None:
    metrics = Metrics("hash", lambda: asyncio.get_running_loop().time(), options)

    async def live(house: House) -> None:
        await body(house, Told(metrics))

    shape = EngineShape(step_s=STEP_S, max_num_seqs=max_num_seqs)
    in_house("virtual", live, shape, observer=metrics, options=options)


def test_each_class_by_its_own_limit() -> None:
    """One row: the first is served at once, each other waits for those before it."""

    async def body(house: House, told: Told) -> None:
        first = house.gateway.submit(request("first", max_tokens=10, priority=-1))
        await anext(first)
        others = [
            house.gateway.submit(request(name, max_tokens=10, priority=priority))
            for name, priority in (("high", -1), ("normal", 0), ("low", 1))
        ]
        await asyncio.gather(*map(collect, [first, *others]))
        assert told("slo_requests_total") == {
            ("high", "true", "ttft"): 1,
            ("high", "false", "ttft"): 1,
            ("high", "true", "tpot"): 2,
            ("normal", "false", "ttft"): 1,
            ("normal", "true", "tpot"): 1,
            ("low", "true", "ttft"): 1,  # 300 ms of 500
            ("low", "true", "tpot"): 1,
        }
        limits = told("slo_limit_seconds")
        assert (limits["normal", "ttft"], limits["low", "ttft"], limits["low", "tpot"]) == (0.015, 0.5, 0.015)

    judged(body)


def test_further_tokens_by_the_gateways_clock() -> None:
    """Two in a batch of one row each, and a third that makes them share; a lone token has no TPOT."""

    async def body(house: House, told: Told) -> None:
        await collect(house.gateway.submit(request("slow", max_tokens=4)))
        await collect(house.gateway.submit(request("one", max_tokens=1)))
        assert told("slo_requests_total", slo="tpot") == {("normal", "false"): 1}
        assert told("slo_requests_total", slo="ttft") == {("normal", "true"): 2}

    judged(body, GatewayOptions(slo=ServiceLevels(ttft_s=1.0, tpot_s=0.99 * STEP_S)))


def test_samples_of_one_request_share_its_first_token() -> None:
    async def body(house: House, told: Told) -> None:
        await collect(house.gateway.submit(request("r", n=3, max_tokens=4, temperature=1.0)))
        assert told("slo_requests_total") == {("normal", "true", "ttft"): 1, ("normal", "true", "tpot"): 3}

    judged(body, max_num_seqs=4)


def test_errors_are_misses_and_what_clients_leave_in_time_is_not_judged() -> None:
    async def body(house: House, told: Told) -> None:
        running = house.gateway.submit(request("running", max_tokens=100))
        waiting = house.gateway.submit(request("waiting", max_tokens=100))
        await anext(running)
        waiting.close()
        running.close()
        await house.until(lambda: house.gateway.open_samples == 0, "the endings")
        assert told("slo_requests_total") == {("normal", "true", "ttft"): 1}  # of the one that had a token

        await house.grow_old()  # no other worker is waited for: what is lost ends
        begun = house.gateway.submit(request("begun", max_tokens=100))
        await anext(begun)
        behind = house.gateway.submit(request("behind", max_tokens=100, priority=1))
        await house.kill_worker()
        await house.lost()
        await collect(begun)
        await collect(behind)
        assert told("slo_requests_total") == {
            ("normal", "true", "ttft"): 2,
            ("normal", "false", "tpot"): 1,
            ("low", "false", "ttft"): 1,
            ("low", "false", "tpot"): 1,
        }

    judged(body)


@pytest.mark.parametrize(("left_after_s", "missed"), [(0.4, 0), (0.6, 1)])
def test_who_leaves_after_the_limit_has_passed_was_not_served_in_time(
    left_after_s: float, missed: int
) -> None:
    async def body(house: House, told: Told) -> None:
        running = house.gateway.submit(request("running", max_tokens=100))
        await anext(running)
        leaves = house.gateway.submit(request("leaves", max_tokens=100, priority=1))
        await asyncio.sleep(left_after_s)
        leaves.close()
        await house.until(lambda: house.gateway.open_samples == 1, "its ending")
        assert told("slo_requests_total", slo="ttft").get(("low", "false"), 0) == missed
        running.close()

    judged(body)


def test_refusals_and_degradations_by_class() -> None:
    ladder = (DegradeStep(lower="n", to=1, above=1e-6), DegradeStep(lower="max_tokens", to=3, above=1e-6))
    hopeless = GatewayOptions(
        slo=ServiceLevels(ttft_s=1e-3, tpot_s=10.0),
        admission=AdmissionOptions(
            early_rejection=True, reject_on_slo_violation=True, low_priority_threshold_s=10.0, degrade=ladder
        ),
    )

    async def body(house: House, told: Told) -> None:
        await collect(house.gateway.submit(request("learn", priority=-1)))
        with pytest.raises(WouldWait):
            house.gateway.submit(request("normal"))
        stream = house.gateway.submit(request("low", priority=1, n=2, max_tokens=3))
        assert stream.degraded == ("n=1",)
        await collect(stream)
        with pytest.raises(RequestRefused):
            house.gateway.submit(request("long", prompt=[1] * 1000, priority=-1))
        assert told("request_refused_total") == {("normal", "predicted_ttft"): 1, ("high", "invalid"): 1}
        assert told("request_degraded_total") == {("low", "n=1"): 1}

    judged(body, hopeless)


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (RequestRefused(ErrorCode.INVALID, "never"), Refusal.INVALID),
        (RequestRefused(ErrorCode.OVERLOADED, "full"), Refusal.QUEUE_FULL),
        (RequestRefused(ErrorCode.UNAVAILABLE, "none"), Refusal.UNAVAILABLE),
        (WouldWait(Slo.TTFT, "late", retry_after_s=1), Refusal.PREDICTED_TTFT),
        (WouldWait(Slo.TPOT, "slow", retry_after_s=1), Refusal.PREDICTED_TPOT),
    ],
)
def test_reasons_of_refusals(refused: RequestRefused, why: Refusal) -> None:
    assert Refusal.of(refused) is why


def test_windows_forget_and_burn_rates_follow_the_objective() -> None:
    clock = Clock(1000.0 * SLOT_S)
    record = ServiceRecord(OPTIONS, clock)

    def now() -> dict[str, tuple[int, float | None, float | None]]:
        found = [one for one in record.attainment() if (one.band, one.slo) == (Band.NORMAL, Slo.TTFT)]
        return {one.window: (one.judged, one.ratio, one.burn_rate) for one in found}

    assert now() == {"5m": (0, None, None), "1h": (0, None, None)}
    for took_s in (0.015, 0.016, None, 0.001):  # the limit itself is met
        record.judge(Band.NORMAL, Slo.TTFT, took_s)
    assert now()["5m"] == (4, 0.5, pytest.approx(5.0))
    clock.now_s += 300
    for _ in range(4):
        record.judge(Band.NORMAL, Slo.TTFT, 0.0)
    assert now()["5m"] == (8, 0.75, pytest.approx(2.5))
    clock.now_s += SLOT_S
    assert now()["5m"] == (4, 1.0, 0.0)
    assert now()["1h"] == (8, 0.75, pytest.approx(2.5))
    clock.now_s += 3600 - SLOT_S
    assert now()["1h"] == (4, 1.0, 0.0)
    clock.now_s += SLOT_S
    assert now() == {"5m": (0, None, None), "1h": (0, None, None)}
    record.judge(Band.NORMAL, Slo.TTFT, None)  # in a slot of the ring that held something else
    assert now()["1h"] == (1, 0.0, pytest.approx(10.0))


def test_the_page_is_of_the_moment_it_is_read() -> None:
    clock = Clock()
    metrics = Metrics("hash", clock, OPTIONS)
    told = Told(metrics)
    normal = {"class": "normal", "slo": "ttft"}
    assert told("slo_attainment_ratio", **normal) == {("5m",): 1.0, ("1h",): 1.0}  # nothing was missed
    assert told("slo_burn_rate", **normal) == {}
    metrics.answered(request("r"), 1.0)
    metrics.answered(request("r"), 0.001)
    assert told("slo_attainment_ratio", **normal) == {("5m",): 0.5, ("1h",): 0.5}
    assert told("slo_burn_rate", **normal) == {("5m",): pytest.approx(5.0), ("1h",): pytest.approx(5.0)}
    assert told("slo_objective_ratio") == {(): 0.9}
    clock.now_s += 400
    assert told("slo_attainment_ratio", **normal) == {("5m",): 1.0, ("1h",): 0.5}


def test_workers_by_state() -> None:
    async def body(house: House, told: Told) -> None:
        assert told("workers") == {("both", "up"): 1}
        member = next(iter(house.gateway.registry.live()))
        house.gateway.member_became(member, MemberState.SUSPECT)
        assert told("workers") == {("both", "suspect"): 1}
        house.gateway.member_became(member, MemberState.UP)
        assert told("workers") == {("both", "up"): 1}
        assert told("workers_suspected_total") == {("both",): 1}
        await house.kill_worker()
        await house.lost()
        assert told("workers") == {}

    judged(body)
