"""The metrics page: the numbers after a known load."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from api_house import VOCAB_SIZE, ApiHouse
from house import EngineShape
from prometheus_client.parser import text_string_to_metric_families

from headrace.cluster import OutputStream
from headrace.protocol.messages import Cancel


def sample(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for found in family.samples:
            if found.name == name and all(found.labels.get(k) == v for k, v in labels.items()):
                return found.value
    raise AssertionError(f"no sample {name} {labels}")


def test_the_numbers_after_a_known_load() -> None:
    with ApiHouse() as house, httpx.Client(base_url=house.url) as http:
        prompt = list(range(300, 340))
        body = {"prompt": prompt, "max_tokens": 10, "ignore_eos": True}
        for _ in range(3):
            assert http.post("/v1/completions", json=body).status_code == 200
        house.assert_quiet()
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        text = answer.text
        assert sample(text, "headrace:prompt_tokens_total", model_name="hash") == 120
        assert sample(text, "headrace:generation_tokens_total") == 30
        assert sample(text, "headrace:request_success_total", finished_reason="length") == 3
        assert sample(text, "headrace:request_success_total", finished_reason="stop") == 0
        assert sample(text, "headrace:prefix_cache_queries_total") == 120
        assert sample(text, "headrace:prefix_cache_hits_total") == 72
        assert sample(text, "headrace:time_to_first_token_seconds_count") == 3
        assert sample(text, "headrace:inter_token_latency_seconds_count") == 27
        assert sample(text, "headrace:e2e_request_latency_seconds_count") == 3
        assert sample(text, "headrace:num_requests_running") == 0
        assert sample(text, "headrace:num_requests_waiting") == 0
        assert sample(text, "headrace:kv_cache_usage_perc") == 0
        steps = sample(text, "headrace:step_seconds_count")
        assert 30 <= steps <= 33

        # A new engine counts from 0; ours go on.
        house.kill_worker()
        house.start_worker()
        assert http.post("/v1/completions", json=body).status_code == 200
        assert sample(http.get("/metrics").text, "headrace:prefix_cache_queries_total") == 160


@pytest.mark.parametrize("asked", [{}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}])
def test_what_a_stop_string_ends_counts_as_stop_and_is_cancelled_once(asked: dict[str, Any]) -> None:
    shape = EngineShape(max_model_len=4000, vocab_size=VOCAB_SIZE, num_blocks=2000, step_s=0.005)
    with ApiHouse(shape) as house, httpx.Client(base_url=house.url) as http:
        prompt, n = [300, 301], asked.get("n", 1)
        stop = house.tokenizer.decode(house.expected(prompt, max_tokens=8, ignore_eos=True).tokens[6:8])
        cancels: list[Cancel] = []
        post = house.gateway.post

        def counted(member: Any, message: Any) -> None:
            if isinstance(message, Cancel):
                cancels.append(message)
            post(member, message)

        house.gateway.post = counted  # type: ignore[method-assign]
        body = {"prompt": prompt, "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stop": stop}
        answer = http.post("/v1/completions", json={**body, **asked})
        assert answer.text.count('"finish_reason":"stop"') == n
        house.assert_quiet()
        text = http.get("/metrics").text
        counts = {
            reason: sample(text, "headrace:request_success_total", finished_reason=reason)
            for reason in ("stop", "abort", "length", "error")
        }
        assert counts == {"stop": n, "abort": 0, "length": 0, "error": 0}
        for name in ("decode_time_seconds", "time_per_output_token_seconds", "inference_time_seconds"):
            assert sample(text, f"headrace:request_{name}_count") == n
        assert sorted(cancel.index or 0 for cancel in cancels) == list(range(n))


def test_a_client_that_leaves_takes_no_complete_sample_with_it() -> None:
    """One sample is complete by its stop string, the other is left: a stop and an abort, one Cancel each."""
    ended: list[str] = []
    stream = OutputStream(
        [("r", 0), ("r", 1), ("s", 0), ("s", 1)],
        lambda request_id, index, counts_as: ended.append(f"{request_id} {index} {counts_as}"),
    )
    stream.complete("r", 1)
    stream.close()
    assert ended == ["r 1 stop", "r 0 cancelled", "s None cancelled"]
