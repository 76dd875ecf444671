"""What clients are told of routing and admission: headers, refusals, explanations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_house import EOS, VOCAB_SIZE, ApiHouse
from house import EngineShape

from headrace.cluster.options import AdmissionOptions, DegradeStep, GatewayOptions, ServiceLevels

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": [300, 301], "max_tokens": 40, "n": 3, "ignore_eos": True}
SHAPE = EngineShape(
    max_model_len=512,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    max_num_batched_tokens=128,
    num_blocks=2000,
    step_s=0.003,  # of the loop's clock, which counts milliseconds
)
AT_ONCE = 1e-9
"""An SLO that nobody holds."""


@pytest.fixture(scope="module")
def modest() -> Iterator[httpx.Client]:
    """Takes what it can from every request that is not urgent."""
    ladder = (DegradeStep(lower="n", to=1), DegradeStep(lower="max_tokens", to=5))
    options = GatewayOptions(slo=ServiceLevels(ttft_s=AT_ONCE), admission=AdmissionOptions(degrade=ladder))
    with ApiHouse(SHAPE, options=options) as house, httpx.Client(base_url=house.url, timeout=20) as http:
        yield http


@pytest.fixture(scope="module")
def strict() -> Iterator[httpx.Client]:
    """Accepts nobody who is not urgent."""
    admission = AdmissionOptions(
        early_rejection=True, reject_on_slo_violation=True, low_priority_threshold_s=AT_ONCE
    )
    options = GatewayOptions(slo=ServiceLevels(ttft_s=AT_ONCE), admission=admission)
    with ApiHouse(SHAPE, options=options) as house, httpx.Client(base_url=house.url, timeout=20) as http:
        yield http


@pytest.mark.parametrize("stream", [False, True])
def test_a_degraded_answer_says_what_was_taken_and_has_no_more(modest: httpx.Client, stream: bool) -> None:
    with modest.stream("POST", TEXT, json=BODY | {"stream": stream}) as answer:
        assert answer.status_code == 200
        assert answer.headers["X-Headrace-Degraded"] == "n=1, max_tokens=5"
        text = "".join(answer.iter_text())
    if not stream:
        answer_of: dict[str, Any] = modest.post(TEXT, json=BODY).json()
        assert len(answer_of["choices"]) == 1
        assert answer_of["choices"][0]["finish_reason"] == "length"
        assert answer_of["usage"]["completion_tokens"] == 5
    else:
        assert '"index":1' not in text.replace(" ", "")


def test_chat_is_degraded_alike(modest: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 50, "ignore_eos": True}
    answer = modest.post(CHAT, json=body)
    assert answer.headers["X-Headrace-Degraded"] == "n=1, max_tokens=5"
    assert len(answer.json()["choices"]) == 1


def test_urgent_and_modest_requests_get_what_they_ask_for(modest: httpx.Client) -> None:
    urgent = modest.post(TEXT, json=BODY | {"priority": -1})
    assert "X-Headrace-Degraded" not in urgent.headers
    assert len(urgent.json()["choices"]) == 3
    small = modest.post(TEXT, json=BODY | {"n": 1, "max_tokens": 2})
    assert "X-Headrace-Degraded" not in small.headers


@pytest.mark.parametrize("priority", [0, 7])
def test_who_would_wait_too_long_is_told_so_at_once(strict: httpx.Client, priority: int) -> None:
    # One that is idle and has shown nothing lately is tried first.
    assert strict.post(TEXT, json=BODY | {"priority": -1}).status_code == 200
    answer = strict.post(TEXT, json=BODY | {"priority": priority})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    error = answer.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert error["code"] == "overloaded"
    assert "would take about" in error["message"]


def test_a_decision_can_be_read_back(strict: httpx.Client) -> None:
    answer = strict.post(TEXT, json=BODY | {"priority": -1}).json()
    (way,) = strict.get(f"/cluster/requests/{answer['id']}").json()["requests"]
    (decision,) = way["decisions"]
    assert decision["policy"] == "cost"
    assert decision["rule"] == "the only one with room"
    (candidate,) = decision["candidates"]
    assert candidate["worker"] == "w"
    assert candidate["score"] == pytest.approx(sum(candidate["terms"].values()))
    assert set(candidate["terms"]) == {"uncached", "queue", "decode load", "hot spot"}
    assert candidate["ttft_s"] > 0


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_why_a_request_was_refused_can_be_read_back_by_the_id_in_its_answer(
    strict: httpx.Client, path: str, stream: bool
) -> None:
    body = BODY if path == TEXT else {"messages": [{"role": "user", "content": "hi"}]}
    answer = strict.post(path, json=body | {"stream": stream})
    assert answer.status_code == 429
    (way,) = strict.get(f"/cluster/requests/{answer.headers['X-Request-Id']}").json()["requests"]
    foreseen, refused = way["events"]
    assert foreseen["what"] == "foreseen"
    assert foreseen["detail"]["class"] == "normal"
    assert foreseen["detail"]["ttft_limit_s"] == AT_ONCE
    assert foreseen["detail"]["pressure"] == pytest.approx(foreseen["detail"]["ttft_s"] / AT_ONCE)
    assert {"tpot_s", "tpot_limit_s"} < set(foreseen["detail"])
    assert refused["what"] == "refused"
    assert refused["detail"]["reason"] == "predicted_ttft"
    assert refused["detail"]["class"] == "normal"
    assert refused["detail"]["why"] == answer.json()["error"]["message"]
    assert refused["detail"]["retry_after_s"] == int(answer.headers["Retry-After"])
    assert way["decisions"] == []


@pytest.mark.parametrize(("path", "prefix"), [(TEXT, "cmpl-"), (CHAT, "chatcmpl-")])
def test_both_forms_of_an_id_lead_to_the_request(strict: httpx.Client, path: str, prefix: str) -> None:
    body = BODY if path == TEXT else {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = strict.post(path, json=body | {"priority": -1})
    name = answer.headers["X-Request-Id"]
    assert answer.json()["id"] == prefix + name
    ways = [strict.get(f"/cluster/requests/{form}").json() for form in (name, prefix + name)]
    assert ways[0] == ways[1]
    streamed = strict.post(path, json=body | {"priority": -1, "stream": True})
    assert f'"{prefix}{streamed.headers["X-Request-Id"]}"' in streamed.text.replace(" ", "")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [300], "max_tokens": 0},
        {"prompt": "x", "model": "another"},
        {"prompt": [300] * 600},
        {},
        [],
    ],
)
def test_every_error_has_an_id(strict: httpx.Client, body: Any) -> None:
    answers = [strict.post(TEXT, json=body) for _ in range(2)]
    assert {answer.status_code for answer in answers} < {400, 404}
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 2


def test_each_step_of_the_ladder_can_be_read_back(modest: httpx.Client) -> None:
    answer = modest.post(TEXT, json=BODY).json()
    (way,) = modest.get(f"/cluster/requests/{answer['id']}").json()["requests"]
    first, *steps = way["events"][:5]
    assert first["what"] == "foreseen"
    assert first["detail"]["pressure"] > 1
    assert [(one["what"], one["detail"].get("why")) for one in steps] == [
        ("degraded", "n=1"),
        ("foreseen", None),
        ("degraded", "max_tokens=5"),
        ("foreseen", None),
    ]
    for taken in (steps[0], steps[2]):
        assert taken["detail"]["pressure"] > taken["detail"]["above"] == 0.8


def test_operators_are_told_how_often_each_class_got_what_it_may_expect(modest: httpx.Client) -> None:
    before = {
        (one["class"], one["slo"]): one for one in levels(modest)["attainment"] if one["window"] == "5m"
    }
    modest.post(TEXT, json=BODY | {"priority": -1, "n": 1}).raise_for_status()
    slo = levels(modest)
    assert slo["objective"] == 0.95
    assert [(one["class"], one["slo"], one["window"]) for one in slo["attainment"]] == [
        (band, which, window)
        for window in ("5m", "1h")
        for band in ("high", "normal", "low")
        for which in ("ttft", "tpot")
    ]
    missed = next(one for one in slo["attainment"] if (one["class"], one["slo"]) == ("high", "ttft"))
    assert missed["judged"] == before["high", "ttft"]["judged"] + 1
    assert (missed["limit_s"], missed["attainment"]) == (AT_ONCE, 0)
    assert missed["burn_rate"] == pytest.approx(20)
    never = next(one for one in slo["attainment"] if (one["class"], one["slo"]) == ("low", "tpot"))
    assert (never["judged"], never["attainment"], never["burn_rate"]) == (0, None, None)


def levels(http: httpx.Client) -> dict[str, Any]:
    slo: dict[str, Any] = http.get("/cluster").json()["slo"]
    return slo
