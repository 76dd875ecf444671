"""A cluster's file in words: each field once, with its value, and whether it is a default."""

from __future__ import annotations

from pathlib import Path

from headrace.config.cluster import ClusterFile
from headrace.config.reading import fields, read_cluster
from headrace.config.words import Line, in_words

SEED = Path(__file__).with_name("seed.yaml")


def lines(file: ClusterFile) -> dict[str, Line]:
    found = [line for section in in_words(file).values() for line in section]
    assert len({line.field for line in found}) == len(found)
    return {line.field: line for line in found}


def test_every_field_is_told_of() -> None:
    told = lines(ClusterFile())
    assert set(told) == {path for path in fields() if not path.startswith("autoscale.")}
    said = set(lines(read_cluster(SEED)))
    assert said - set(told) == {
        f"autoscale.{role}.{field}"
        for role, measure in (("prefill", "gpu_utilization"), ("decode", "kv_cache_usage"))
        for field in (
            *("min_replicas", "max_replicas", "window_s", "scale_up.queue_length", f"scale_up.{measure}"),
            *("scale_down.queue_length", f"scale_down.{measure}"),
        )
    }


def test_defaults_are_marked_as_such() -> None:
    assert all(line.default for line in lines(ClusterFile()).values())
    told = lines(read_cluster(SEED))
    assert {field for field, line in told.items() if not line.default} == {
        "model",
        "pools.prefill.replicas",
        "pools.decode.replicas",
        *(f"split_policy.{name}" for name in read_cluster(SEED).split_policy.model_fields_set),
        *("cache.reuse_prefix", "cache.min_cache_hit_ratio"),
        *("qos.enable_early_rejection", "qos.low_priority_threshold_ms", "qos.reject_on_slo_violation"),
        *(field for field in told if field.startswith("autoscale.") and not field.endswith("window_s")),
    }


def test_what_acts_later_is_marked_as_such() -> None:
    later = {field for field, line in lines(read_cluster(SEED)).items() if not line.acts}
    assert later == {
        field
        for field in lines(read_cluster(SEED))
        if field.startswith("autoscale.") and not field.endswith("min_replicas")
    }


def test_words_follow_the_values() -> None:
    told = lines(read_cluster(SEED))
    assert told["pools.prefill.replicas"].value == 4
    assert "from autoscale.prefill.min_replicas" in told["pools.prefill.replicas"].says
    assert "more than 256 uncached tokens" in told["split_policy.prompt_length_threshold"].says
    assert "less than 75%" in told["cache.min_cache_hit_ratio"].says
    assert "above 500 ms" in told["qos.low_priority_threshold_ms"].says
    assert "beside the others, the share of KV cache held is below 30%" in (
        told["autoscale.decode.scale_down.kv_cache_usage"].says
    )
    off = lines(read_cluster(SEED, ("qos.enable_early_rejection=false", "routing.policy=random")))
    assert "does not act" in off["qos.low_priority_threshold_ms"].says
    assert "does not act" in off["split_policy.prefix_cache_weight"].says
    assert "one worker does everything" in lines(ClusterFile())["pools.both.replicas"].says
