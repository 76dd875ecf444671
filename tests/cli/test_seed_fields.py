"""Field by field: what the Dynamo-style file says arrives where it acts, through `serve --config`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from noted_serve import Run, noted_serve

from headrace.config.reading import ConfigError, read_cluster

SEED = Path(__file__).parents[1] / "config" / "seed.yaml"
Given = dict[str, Any]

ARRIVES: dict[str, tuple[Callable[[Given], object], object, object, object]] = {
    # field: where it acts, what the seed makes of it there, another value, what that makes of it
    "model": (lambda g: g["model"], "llama-70b", "other", "other"),
    "split_policy.prompt_length_threshold": (
        lambda g: g["gateway"].split.prompt_length_threshold, 256, 99, 99
    ),
    "split_policy.prefix_cache_weight": (lambda g: g["gateway"].routing.prefix_cache_weight, 10.0, 3, 3.0),
    "split_policy.queue_length_weight": (lambda g: g["gateway"].routing.queue_length_weight, 1.5, 0, 0.0),
    "split_policy.decode_load_weight": (lambda g: g["gateway"].routing.decode_load_weight, 0.5, 2.5, 2.5),
    "split_policy.enable_hotspot_prevention": (
        lambda g: g["gateway"].routing.hotspot_prevention, True, False, False
    ),
    "cache.reuse_prefix": (lambda g: g["engine"].prefix_caching, True, False, False),
    "cache.min_cache_hit_ratio": (lambda g: g["gateway"].routing.min_cache_hit_ratio, 0.75, 1, 1.0),
    "autoscale.prefill.min_replicas": (lambda g: g["pools"].prefill, 4, 2, 2),
    "autoscale.decode.min_replicas": (lambda g: g["pools"].decode, 8, 3, 3),
    "qos.enable_early_rejection": (lambda g: g["gateway"].admission.early_rejection, True, False, False),
    "qos.low_priority_threshold_ms": (
        lambda g: g["gateway"].admission.low_priority_threshold_s, 0.5, 250, 0.25
    ),
    "qos.reject_on_slo_violation": (
        lambda g: g["gateway"].admission.reject_on_slo_violation, True, False, False
    ),
}  # fmt: skip
ADDITIONS: dict[str, tuple[Callable[[Given], object], object, object, object]] = {
    "split_policy.prefill_queue_max": (lambda g: g["gateway"].split.prefill_queue_max, 32, 4, 4),
    "routing.policy": (lambda g: g["gateway"].routing.policy, "cost", "prefix", "prefix"),
    "slo.ttft_ms": (lambda g: g["gateway"].slo.ttft_s, 0.2, 500, 0.5),
    "slo.tpot_ms": (lambda g: g["gateway"].slo.tpot_s, 0.05, 20, 0.02),
    "slo.objective": (lambda g: g["gateway"].slo.objective, 0.95, 0.99, 0.99),
    "qos.policy": (lambda g: g["gateway"].admission.policy, "predictive", "naive", "naive"),
    "qos.degrade": (
        lambda g: [(step.lower, step.to, step.above) for step in g["gateway"].admission.degrade],
        [],
        "[{lower: max_tokens, to: 64}, {lower: n, to: 1, above: 0.9}]",
        [("max_tokens", 64, 0.8), ("n", 1, 0.9)],
    ),
    "pools.prefill.replicas": (lambda g: len(g["pools"].roles()), 12, 5, 13),
}
CHECKED: dict[str, object] = {
    # field: a value that is refused; these act in a later version
    "autoscale.prefill.max_replicas": 3,
    "autoscale.prefill.scale_up.queue_length": 2,
    "autoscale.prefill.scale_up.gpu_utilization": 101,
    "autoscale.prefill.scale_down.queue_length": 9,
    "autoscale.prefill.scale_down.gpu_utilization": 80,
    "autoscale.decode.max_replicas": 7,
    "autoscale.decode.scale_up.queue_length": -1,
    "autoscale.decode.scale_up.kv_cache_usage": 30,
    "autoscale.decode.scale_down.queue_length": 16,
    "autoscale.decode.scale_down.kv_cache_usage": 100.5,
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return noted_serve(monkeypatch, tmp_path)


def leaves(content: dict[str, Any], under: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in content.items():
        found |= leaves(value, f"{under}{name}.") if isinstance(value, dict) else {under + name}
    return found


def test_no_field_of_the_seed_is_left_out() -> None:
    assert leaves(yaml.safe_load(SEED.read_text())) == ARRIVES.keys() | CHECKED.keys()


@pytest.mark.parametrize("field", [*ARRIVES, *ADDITIONS])
def test_a_field_arrives_where_it_acts(run: Run, field: str) -> None:
    where, by_seed, another, becomes = (ARRIVES | ADDITIONS)[field]
    code, output, given = run("serve", "--config", str(SEED))
    assert code == 0, output
    assert where(given) == by_seed
    code, output, given = run("serve", "--config", str(SEED), "--set", f"{field}={another}")
    assert code == 0, output
    assert where(given) == becomes


@pytest.mark.parametrize("field", CHECKED)
def test_a_field_that_acts_later_is_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=field.rpartition(".")[2]):
        read_cluster(SEED, (f"{field}={CHECKED[field]}",))


def test_as_many_workers_as_autoscale_says_are_started_where_pools_says_nothing(run: Run) -> None:
    _, _, given = run("serve", "--config", str(SEED), "--set", "pools.decode.replicas=9", "--both", "1")
    roles = [str(role) for role in given["pools"].roles().values()]
    assert [roles.count(role) for role in ("prefill", "decode", "both")] == [4, 9, 1]
