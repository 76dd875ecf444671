"""Fields that contradict each other are refused with the reason; what only does not act is told of."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.config.cluster import ClusterFile
from headrace.config.consistency import contradictions, remarks

UP_DOWN = {"scale_up": {"queue_length": 8}, "scale_down": {"queue_length": 2}}


def file(**content: Any) -> ClusterFile:
    return ClusterFile.model_validate(content)


def scaled(role: str = "both", **content: Any) -> ClusterFile:
    return file(autoscale={role: {"min_replicas": 1, "max_replicas": 2, **UP_DOWN, **content}})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (scaled(min_replicas=3), "autoscale.both.min_replicas: 3 is above max_replicas (2)"),
        (
            scaled(scale_down={"queue_length": 8}),
            "autoscale.both.scale_down.queue_length: 8 is not below scale_up.queue_length (8)",
        ),
        (scaled(scale_up={}), "autoscale.both.scale_up: no condition is given"),
        (scaled(scale_down={}), "autoscale.both.scale_down: no condition is given"),
        (
            file(
                pools={"both": {"replicas": 3}}, autoscale=scaled().autoscale.model_dump(exclude_unset=True)
            ),
            "pools.both.replicas: 3 is not within min_replicas (1) and max_replicas (2) of autoscale.both",
        ),
        (file(pools={"prefill": {"replicas": 1}}), "pools.prefill: 1 workers would prefill for nobody"),
        (scaled("prefill"), "pools.prefill: 1 workers would prefill for nobody"),
        (file(pools={"decode": {"replicas": 2}}), "pools.decode: 2 workers would have to prefill everything"),
        (scaled("decode"), "pools.decode: 1 workers would have to prefill everything"),
        (
            file(
                pools={"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
                engine={"max_model_len": 256},
            ),
            "split_policy.prompt_length_threshold: no prompt has more than 256 tokens",
        ),
        (
            file(qos={"degrade": [{"lower": "n", "to": 2}, {"lower": "n", "to": 2}]}),
            "qos.degrade.1: n is down to 2 by then, and 2 is not below",
        ),
        (
            file(engine={"max_num_seqs": 64, "max_num_batched_tokens": 32}),
            "engine: max_num_batched_tokens (32) must be at least max_num_seqs (64)",
        ),
    ],
)
def test_contradictions_are_refused(found: ClusterFile, said: str) -> None:
    (problem,) = contradictions(found)
    assert problem.startswith(said)


@pytest.mark.parametrize(
    "fine",
    [
        file(),
        scaled(),
        scaled(max_replicas=1, scale_up={}, scale_down={}),
        file(pools={"prefill": {"replicas": 0}, "decode": {"replicas": 2}}),
        file(pools={"both": {"replicas": 2}, "decode": {"replicas": 2}}),
        file(pools={"both": {"replicas": 1}}, engine={"max_model_len": 100}),
        file(engine={"kv_cache_memory": "64MiB", "threads": 1}),
    ],
)
def test_what_can_be_meant_is_let_be(fine: ClusterFile) -> None:
    assert contradictions(fine) == []


@pytest.mark.parametrize(
    ("found", "fields"),
    [
        (file(split_policy={"prefill_queue_max": 3}), ["split_policy.prefill_queue_max"]),
        (
            file(
                routing={"policy": "random"},
                split_policy={"queue_length_weight": 3, "enable_hotspot_prevention": True},
                cache={"min_cache_hit_ratio": 0.5},
            ),
            [
                "split_policy.queue_length_weight",
                "split_policy.enable_hotspot_prevention",
                "cache.min_cache_hit_ratio",
            ],
        ),
        (
            file(cache={"reuse_prefix": False, "min_cache_hit_ratio": 0.5}),
            ["cache.min_cache_hit_ratio"],
        ),
        (file(transfer={"connector": "tcp", "check_reads": True}), ["transfer.check_reads"]),
        (file(qos={"reject_on_slo_violation": True}), ["qos.reject_on_slo_violation"]),
        (file(qos={"policy": "naive", "degrade": [{"lower": "n", "to": 1}]}), []),
        (
            file(qos={"enable_early_rejection": True, "reject_on_slo_violation": True}),
            ["qos.low_priority_threshold_ms"],
        ),
        (
            file(qos={"enable_early_rejection": True, "reject_on_slo_violation": True}, slo={"ttft_ms": 500}),
            [],
        ),
        (file(slo={"objective": 0.5}), ["slo.objective"]),
        (file(slo={"objective": 0.7}), []),
        (file(), []),
    ],
)
def test_what_does_not_act_is_told_of(found: ClusterFile, fields: list[str]) -> None:
    assert [remark.partition(":")[0] for remark in remarks(found)] == fields
