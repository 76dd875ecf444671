"""Every metric moves as it should, by exact numbers where the clock is virtual."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.cluster.options import GatewayOptions
from headrace.engine.limits import RequestRefused
from headrace.observe import Metrics
from headrace.observe.metrics import PREFIX

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from house import EngineShape, House, collect, in_house, request

STEP_S = 0.01
NORMAL = {"class": "normal"}


class Page:
    """The samples of a metrics page by name and labels."""

    def __init__(self, metrics: Metrics) -> None:
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(metrics.text().decode())
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        return self.labelled(name)

    def labelled(self, name: str, **labels: str) -> float:
        return self._samples[PREFIX + name, frozenset({**labels, "model_name": "hash"}.items())]

    def facts(self, name: str) -> dict[str, str]:
        ((labels, value),) = [
            (set_, value) for (n, set_), value in self._samples.items() if n == PREFIX + name
        ]
        assert value == 1
        return dict(labels)

    def histogram(self, name: str) -> tuple[int, float]:
        """Count and sum."""
        return int(self[f"{name}_count"]), self[f"{name}_sum"]


def measured(
    body: Callable[[House, Metrics], Awaitable[None]], options: GatewayOptions | None = None, **shape: float
) -> None:
    metrics = Metrics("hash", lambda: asyncio.get_running_loop().time(), options)

    async def live(house: House) -> None:
        await body(house, metrics)

    engine = EngineShape(**{"step_s": STEP_S, **shape})  # type: ignore[arg-type]
    in_house("virtual", live, engine, observer=metrics, options=options)


def seconds(count: int, total: float) -> tuple[int, object]:
    return count, pytest.approx(total)


def test_one_request_in_chunks() -> None:
    """Ten prompt tokens in chunks of four, five output tokens: three steps, then four."""

    async def body(house: House, metrics: Metrics) -> None:
        began = house.world.now()
        await collect(house.gateway.submit(request("r", prompt=list(range(10)), max_tokens=5)))
        whole_s = house.world.now() - began
        page = Page(metrics)
        assert page.histogram("request_queue_time_seconds") == seconds(1, 0)
        assert page.histogram("request_prefill_time_seconds") == seconds(1, 3 * STEP_S)
        assert page.histogram("request_decode_time_seconds") == seconds(1, 4 * STEP_S)
        assert page.histogram("request_inference_time_seconds") == seconds(1, 7 * STEP_S)
        assert page.histogram("request_time_per_output_token_seconds") == seconds(1, STEP_S)
        count, ttft_s = page.histogram("time_to_first_token_seconds")
        assert count == 1
        assert 3 * STEP_S < ttft_s < 4 * STEP_S  # and the network, there and back
        count, gaps_s = page.histogram("inter_token_latency_seconds")
        assert count == 4
        assert page.histogram("e2e_request_latency_seconds") == seconds(1, whole_s)
        assert ttft_s + gaps_s == pytest.approx(whole_s)
        assert page.histogram("step_seconds") == seconds(7, 7 * STEP_S)
        assert page.histogram("step_overhead_seconds") == seconds(7, 0)
        assert page.histogram("iteration_tokens_total") == (7, 14)
        assert page["engine_busy_seconds_total"] == pytest.approx(7 * STEP_S)
        assert page["kernel_seconds_total"] == pytest.approx(7 * STEP_S)
        assert page["prompt_tokens_total"] == 10
        assert page["generation_tokens_total"] == 5
        assert page.histogram("request_prompt_tokens") == (1, 10)
        assert page.histogram("request_generation_tokens") == (1, 5)
        assert page.histogram("request_params_n") == (1, 1)
        assert page.histogram("request_params_max_tokens") == (1, 5)

    measured(body, max_num_batched_tokens=4, max_num_seqs=4)


def test_one_waits_for_the_only_row() -> None:
    async def body(house: House, metrics: Metrics) -> None:
        streams = [house.gateway.submit(request(name, max_tokens=6)) for name in ("a", "b")]
        await anext(streams[0])
        await anext(streams[0])  # the second request was taken in between the two steps
        now = Page(metrics)
        assert (now["num_requests_running"], now["num_requests_waiting"]) == (1, 1)
        assert now["kv_cache_usage_perc"] == 2 / 200
        assert now["kv_cache_held_tokens"] == 6  # the prompt of five and the first token, in blocks of four
        assert now["kv_cache_efficiency_perc"] == 6 / 8
        for stream in streams:
            await collect(stream)
        page = Page(metrics)
        assert page.histogram("request_queue_time_seconds") == seconds(2, 5 * STEP_S)
        assert page.histogram("request_prefill_time_seconds") == seconds(2, 2 * STEP_S)
        assert page["num_requests_running"] == page["num_requests_waiting"] == 0
        assert page["kv_cache_usage_perc"] == page["kv_cache_held_tokens"] == 0
        assert page["kv_cache_efficiency_perc"] == 1

    measured(body, max_num_seqs=1)


def test_samples_share_one_prompt() -> None:
    async def body(house: House, metrics: Metrics) -> None:
        await collect(house.gateway.submit(request("r", n=3, max_tokens=4, temperature=1.0)))
        page = Page(metrics)
        assert page["prompt_tokens_total"] == 5
        assert page["generation_tokens_total"] == 12
        assert page.histogram("time_to_first_token_seconds")[0] == 3
        assert page.histogram("request_params_n") == (1, 3)
        assert page.labelled("request_success_total", finished_reason="length") == 3
        assert page["prefix_cache_queries_total"] == 15
        assert page["prefix_cache_hits_total"] == 8  # the full block of five tokens, twice

    measured(body)


def test_how_sequences_end() -> None:
    """By length, cancelled while waiting and while decoding, complete by a stop string, refused, lost."""

    async def body(house: House, metrics: Metrics) -> None:
        def endings() -> dict[str, float]:
            page = Page(metrics)
            reasons = ("stop", "length", "abort", "error")
            return {r: page.labelled("request_success_total", finished_reason=r) for r in reasons}

        await collect(house.gateway.submit(request("whole")))
        assert endings() == {"stop": 0, "length": 1, "abort": 0, "error": 0}
        ended_s = Page(metrics).histogram("request_decode_time_seconds")

        running = house.gateway.submit(request("running", max_tokens=100))
        waiting = house.gateway.submit(request("waiting", max_tokens=100))
        await anext(running)
        waiting.close()
        running.close()
        await house.until(lambda: house.gateway.open_samples == 0, "the endings")
        assert endings() == {"stop": 0, "length": 1, "abort": 2, "error": 0}
        page = Page(metrics)
        assert page.histogram("request_decode_time_seconds") == ended_s  # a cut phase tells nothing
        assert page.histogram("request_queue_time_seconds")[0] == 2

        stopped = house.gateway.submit(request("stopped", max_tokens=100))
        await anext(stopped)
        stopped.complete("stopped", 0)
        await collect(stopped)
        assert endings() == {"stop": 1, "length": 1, "abort": 2, "error": 0}
        assert Page(metrics).histogram("request_decode_time_seconds")[0] == 2

        with pytest.raises(RequestRefused):
            house.gateway.submit(request("long", prompt=[1] * 1000))
        assert Page(metrics).labelled("request_refused_total", **NORMAL, reason="invalid") == 1

        await house.grow_old()
        lost = house.gateway.submit(request("lost", max_tokens=100))
        await anext(lost)
        await house.kill_worker()
        await house.lost()
        assert endings() == {"stop": 1, "length": 1, "abort": 2, "error": 1}
        page = Page(metrics)
        assert page["engine_up"] == page["num_requests_running"] == page["kv_cache_usage_perc"] == 0
        with pytest.raises(RequestRefused):
            house.gateway.submit(request("late"))
        assert Page(metrics).labelled("request_refused_total", **NORMAL, reason="unavailable") == 1

    measured(body, max_num_seqs=1)


def test_preemptions_and_evictions_are_counted() -> None:
    """Two sequences grow to 20 positions each in a cache of 32; then others take the cached blocks."""

    async def body(house: House, metrics: Metrics) -> None:
        streams = [
            house.gateway.submit(request(name, prompt=[ord(name)] * 4, max_tokens=16)) for name in "abcd"
        ]
        await asyncio.gather(*map(collect, streams))
        page = Page(metrics)
        assert page["num_preemptions_total"] >= 1
        assert page["kv_cache_evictions_total"] >= 1
        assert page["generation_tokens_total"] == 64  # what is computed again is not generated again
        assert page["prefix_cache_queries_total"] == 16

    measured(body, num_blocks=8, max_num_seqs=2)


def test_an_engine_that_starts_again_counts_on() -> None:
    async def body(house: House, metrics: Metrics) -> None:
        await collect(house.gateway.submit(request("a")))
        before = Page(metrics)
        assert before["engine_starts_total"] == before["engine_up"] == 1
        await house.kill_worker()
        await house.lost()
        house.start_worker()
        await house.gateway.wait_ready()
        again = Page(metrics)
        assert again["prefix_cache_queries_total"] == before["prefix_cache_queries_total"] == 5
        await collect(house.gateway.submit(request("b")))
        page = Page(metrics)
        assert page["engine_starts_total"] == 2
        assert page["prefix_cache_queries_total"] == 10
        assert page["prefix_cache_hits_total"] == 0  # the new engine's cache was empty
        assert page["generation_tokens_total"] == 16

    measured(body)


def test_facts_about_the_engine() -> None:
    async def body(house: House, metrics: Metrics) -> None:
        page = Page(metrics)
        assert page.facts("build_info")["version"]
        facts = page.facts("model_info")
        assert (facts["model_name"], facts["dtype"], facts["max_model_len"]) == ("hash", "uint64", "256")
        facts = page.facts("cache_config_info")
        assert (facts["block_size"], facts["num_blocks"]) == ("4", "200")
        assert page["kv_cache_bytes"] == 200 * 4 * 8
        assert page["model_weight_bytes"] == 0

    measured(body)


def test_the_page_before_there_is_an_engine() -> None:
    metrics = Metrics('a "quoted" name\n', lambda: 0.0)
    families = list(text_string_to_metric_families(metrics.text().decode()))
    assert all(
        sample.labels["model_name"] == 'a "quoted" name\n' for family in families for sample in family.samples
    )
    assert not any(math.isnan(sample.value) for family in families for sample in family.samples)


def test_tokens_that_come_together_share_their_time() -> None:
    metrics = Metrics("hash", lambda: 0.0)
    metrics.first_tokens(request("r"), 0.5, 2, 7)
    metrics.next_tokens(request("r"), 0.3, 3)
    page = Page(metrics)
    assert page.histogram("inter_token_latency_seconds") == seconds(3, 0.3)
    assert page.labelled("inter_token_latency_seconds_bucket", le="0.1") == 3
    assert page.labelled("inter_token_latency_seconds_bucket", le="0.075") == 0
    assert page.histogram("time_to_first_token_seconds") == seconds(1, 0.5)
    assert page["generation_tokens_total"] == 5
    assert page["prompt_tokens_total"] == 7
