"""The metrics page: the numbers after a known load."""

from __future__ import annotations

import httpx
from api_house import ApiHouse
from prometheus_client.parser import text_string_to_metric_families


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
