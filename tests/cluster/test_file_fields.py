"""Field by field: what a cluster's file says changes what the gateway decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from members import member, step_stats
from test_admission import Foreseen
from test_routing import House

from headrace.api.options import gateway_options
from headrace.cluster.admission import Admission
from headrace.cluster.options import GatewayOptions
from headrace.cluster.placement import every, possible_prefills, why_whole
from headrace.config.reading import read_cluster
from headrace.engine.limits import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import GenerateRequest, SamplingParams

Decides = Callable[[GatewayOptions], object]


def options(*fields: str) -> GatewayOptions:
    """What a file with these fields asks of a gateway."""
    return gateway_options(read_cluster(None, fields))


def chosen(house: Callable[..., House]) -> Decides:
    """Which worker a request of 401 tokens goes to."""
    return lambda asked: house(**dataclasses.asdict(asked.routing)).choose().worker


def offloads(asked: GatewayOptions) -> bool:
    request = GenerateRequest(request_id="r", prompt=[1] * 300, sampling=SamplingParams(max_tokens=1))
    return not why_whole(request, member("home", Role.DECODE), 300, asked.split)


def finds_a_prefill_worker(asked: GatewayOptions) -> bool:
    busy = member("busy", Role.PREFILL)
    busy.exports = 10
    return bool(possible_prefills(every([busy]), member("home", Role.DECODE), asked.split))


def hot(**routing: object) -> House:
    busy, other = member("holder"), member("other")
    for _ in range(100):
        busy.told(step_stats(rows=1, tokens=1, step_s=0.05), 1.0)
        other.told(step_stats(rows=1, tokens=1, step_s=0.0001), 1.0)
    return House(busy, other, holds={"holder": 400}, **routing)


def admits(priority: int, ttft_s: float, tpot_s: float = 0.01) -> Decides:
    """What becomes of a request of 4 samples that would wait so long: refused, taken from, or let in."""

    def decides(asked: GatewayOptions) -> object:
        doors = Admission(asked.admission, asked.slo, Foreseen(ttft_s, tpot_s))
        request = GenerateRequest(
            request_id="r", prompt=[1], sampling=SamplingParams(max_tokens=9, n=4), priority=priority
        )
        try:
            return doors.admit([request]).degraded
        except RequestRefused:
            return "refused"

    return decides


CALM = "split_policy.enable_hotspot_prevention=false"
EARLY = "qos.enable_early_rejection=true"
STRICT = "qos.reject_on_slo_violation=true"
HOLDER_IS_BUSY = chosen(
    lambda **routing: House(member("holder", queued=350), member("other"), holds={"holder": 400}, **routing)
)
HOLDER_DECODES = chosen(
    lambda **routing: House(
        member("holder", open_samples=7), member("other"), holds={"holder": 40}, **routing
    )
)
HOLDS_A_QUARTER = chosen(
    lambda **routing: House(member("holder", queued=30), member("other"), holds={"holder": 100}, **routing)
)


@pytest.mark.parametrize(
    ("decides", "fields", "decision", "field", "otherwise"),
    [
        (offloads, [], True, "split_policy.prompt_length_threshold=300", False),
        (finds_a_prefill_worker, [], True, "split_policy.prefill_queue_max=10", False),
        (HOLDER_IS_BUSY, [CALM], "holder", "split_policy.prefix_cache_weight=0.5", "other"),
        (HOLDER_IS_BUSY, [CALM], "holder", "split_policy.queue_length_weight=1.5", "other"),
        (HOLDER_DECODES, [CALM], "other", "split_policy.decode_load_weight=0.1", "holder"),
        (chosen(hot), [], "other", CALM, "holder"),
        (HOLDS_A_QUARTER, [CALM], "holder", "cache.min_cache_hit_ratio=0.75", "other"),
        (
            HOLDER_IS_BUSY, [CALM, "split_policy.queue_length_weight=9"], "other",
            "routing.policy=prefix", "holder",
        ),
        (admits(0, 0.3), [STRICT], (), EARLY, "refused"),
        (admits(0, 0.3), [EARLY], (), STRICT, "refused"),
        (admits(1, 0.3), [EARLY], (), "qos.low_priority_threshold_ms=250", "refused"),
        (admits(0, 0.3), [EARLY, STRICT], "refused", "slo.ttft_ms=400", ()),
        (admits(0, 0.1, 0.06), [EARLY, STRICT], "refused", "slo.tpot_ms=70", ()),
        (admits(0, 0.18), [EARLY, STRICT], (), "qos.degrade=[{lower: n, to: 2}]", ("n=2",)),
    ],
)  # fmt: skip
def test_a_field_changes_the_decision(
    decides: Decides, fields: list[str], decision: object, field: str, otherwise: object
) -> None:
    assert decides(options(*fields)) == decision
    assert decides(options(*fields, field)) == otherwise
