"""Metrics of several models on one page."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.cluster import GatewayObserver
from headrace.cluster.classes import Refusal
from headrace.cluster.options import AdmissionOptions, DegradeStep, GatewayOptions, ModelOptions
from headrace.observe import Metrics, MetricsByModel
from headrace.protocol.requests import GenerateRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import request
from members import member, step_stats

OPTIONS = GatewayOptions(
    models=(ModelOptions(name="m", smaller="tiny"), ModelOptions(name="tiny")),
    admission=AdmissionOptions(degrade=(DegradeStep(lower="model"), DegradeStep(lower="n", to=1))),
)


def of(model: str) -> GenerateRequest:
    return msgspec.structs.replace(request("r"), model=model)


def page(metrics: MetricsByModel) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, the model's first."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (sample.name.removeprefix("headrace:"), labels.pop("model_name"), *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def test_what_is_observed_is_counted_for_its_model() -> None:
    metrics = MetricsByModel(lambda: 0.0, OPTIONS)
    metrics.first_tokens(of("m"), 0.5, 2, 7)
    metrics.refused(of("tiny"), Refusal.QUEUE_FULL)
    metrics.degraded(of("tiny"), ("model=tiny", "n=1"))
    found = page(metrics)
    assert (found["prompt_tokens_total", "m"], found["prompt_tokens_total", "tiny"]) == (7, 0)
    assert found["request_refused_total", "tiny", "normal", "queue_full"] == 1
    assert found["request_refused_total", "m", "normal", "queue_full"] == 0
    assert found["request_degraded_total", "tiny", "normal", "model=tiny"] == 1
    steps = {key[3] for key in found if key[:2] == ("request_degraded_total", "m")}
    assert steps == {"n=1"}, "nothing is served by the large model in place of another"


def test_a_worker_that_comes_back_with_another_model_is_counted_there() -> None:
    metrics = MetricsByModel(lambda: 0.0, OPTIONS)
    worker = member("w").info
    metrics.engine_up(worker)
    other = msgspec.structs.replace(worker, engine=msgspec.structs.replace(worker.engine, model="tiny"))
    metrics.engine_up(other)
    assert [page(metrics)["engine_up", model] for model in ("m", "tiny")] == [0, 1]
    metrics.engine_lost("w")
    assert [page(metrics)["engine_up", model] for model in ("m", "tiny")] == [0, 0]


def test_attainment_is_of_all_models_together() -> None:
    metrics = MetricsByModel(lambda: 0.0, OPTIONS)
    for model, took_s in (("m", 0.1), ("m", 9.0), ("tiny", 0.1), ("tiny", 0.1)):
        metrics.answered(of(model), took_s)
    (one,) = (
        one for one in metrics.attainment() if (one.band, one.slo, one.window) == ("normal", "ttft", "5m")
    )
    assert (one.judged, one.met, one.ratio) == (4, 3, 0.75)


def test_nothing_that_is_observed_is_lost() -> None:
    for name, _ in inspect.getmembers(GatewayObserver, inspect.isfunction):
        assert name in vars(MetricsByModel), f"{name} is not handed on"


def test_what_is_kept_of_workers_that_are_gone_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.observe.metrics.GONE_KEPT", 3)
    for metrics in (Metrics("m", lambda: 0.0), MetricsByModel(lambda: 0.0, OPTIONS)):
        for number in range(50):
            metrics.engine_up(member(f"w{number}").info)
            metrics.step(f"w{number}", step_stats(prefix_queries=10))
            metrics.engine_lost(f"w{number}")
        one = metrics if isinstance(metrics, Metrics) else metrics._of["m"]
        assert (len(one._counted), len(one._gone)) == (0, 3)
        if isinstance(metrics, MetricsByModel):
            assert not metrics._workers


def test_an_engine_whose_connection_was_lost_counts_on_and_is_no_other() -> None:
    metrics, worker = MetricsByModel(lambda: 0.0, OPTIONS), member("w").info
    metrics.engine_up(worker)
    metrics.step("w", step_stats(prefix_queries=10))
    metrics.engine_lost("w")
    metrics.engine_up(worker)
    metrics.step("w", step_stats(prefix_queries=15))
    found = page(metrics)
    assert (found["engine_starts_total", "m"], found["prefix_cache_queries_total", "m"]) == (1, 15)
    metrics.engine_lost("w")
    metrics.engine_up(msgspec.structs.replace(worker, generation=worker.generation + 1))
    metrics.step("w", step_stats(prefix_queries=4))
    found = page(metrics)
    assert (found["engine_starts_total", "m"], found["prefix_cache_queries_total", "m"]) == (2, 19)
