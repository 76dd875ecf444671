"""Bodies of the largest size that are as bad as a body can be: refused for little memory and few errors."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from api_house import ApiHouse
from pydantic import BaseModel, ValidationError

from headrace.api.app import OTHER_VALUES
from headrace.api.schema import (
    MAX_DETOKENIZED,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

MANY = 300_000
HELLO = {"role": "user", "content": "a"}
TEXT, CHAT = {"prompt": "a"}, {"messages": [HELLO]}

WORST: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": ["a", 1] * MANY}),
    (CompletionRequest, {"prompt": [1] * MANY + ["a"]}),
    (CompletionRequest, {"prompt": [[]] * MANY}),
    (CompletionRequest, {"prompt": [None] * MANY}),
    (CompletionRequest, {"prompt": [[1] * MANY + [None]]}),
    (CompletionRequest, {**TEXT, "stop": [1] * MANY}),
    (CompletionRequest, {**TEXT, "stop": ["a"] * MANY}),
    (CompletionRequest, {**TEXT, "stop_token_ids": ["a"] * MANY}),
    (CompletionRequest, {**TEXT, "stop_token_ids": [1] * MANY}),
    (CompletionRequest, {**TEXT, "logit_bias": {str(number): "a" for number in range(MANY)}}),
    (CompletionRequest, {**TEXT, "logit_bias": dict.fromkeys(map(str, range(MANY)), 1.0)}),
    (CompletionRequest, {**TEXT, "guided_json": [{}] * MANY}),
    (ChatCompletionRequest, {"messages": [1] * MANY}),
    (ChatCompletionRequest, {"messages": [HELLO] * MANY}),
    (ChatCompletionRequest, {"messages": [{**HELLO, "content": [1] * MANY}]}),
    (ChatCompletionRequest, {"messages": [{**HELLO, "content": [{}] * MANY}]}),
    (ChatCompletionRequest, {"messages": [{**HELLO, "role": "a" * MANY}]}),
    (ChatCompletionRequest, {**CHAT, "tools": [1] * MANY}),
    (ChatCompletionRequest, {**CHAT, "response_format": {"type": "a" * MANY}}),
    (TokenizeRequest, {"messages": [[]] * MANY}),
    (DetokenizeRequest, {"tokens": ["a"] * MANY}),
    (DetokenizeRequest, {"tokens": [1] * (MAX_DETOKENIZED + 1)}),
]


@pytest.mark.parametrize(("model", "body"), WORST)
def test_a_refusal_is_short_however_much_is_wrong(model: type[BaseModel], body: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValidationError) as refused:
            model.model_validate(body)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.error_count() <= max(2, MAX_LOGIT_BIAS if "logit_bias" in body else 0)
    assert most < 10 << 20
    assert sum(len(error["msg"]) for error in refused.value.errors(include_url=False)) < 1000


@pytest.mark.parametrize("form", [[7] * MANY, [[7] * MANY, [8]], ["a"] * 256, "a" * MANY])
def test_a_prompt_is_taken_as_it_came(form: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": form}).prompt is form


def test_the_most_messages_are_taken() -> None:
    body = {"messages": [HELLO] * MAX_MESSAGES}
    assert len(ChatCompletionRequest.model_validate(body).messages) == MAX_MESSAGES
    with pytest.raises(ValidationError, match=f"at most {MAX_MESSAGES} items"):
        ChatCompletionRequest.model_validate({"messages": [HELLO] * (MAX_MESSAGES + 1)})


VALUES = MAX_DETOKENIZED + OTHER_VALUES
FULL: list[Callable[[], str]] = [
    lambda: "[" * (VALUES + 1),
    lambda: '{"prompt": [' + "[]," * VALUES + "[]]}",
    lambda: '{"x": [' + '{"":0},' * VALUES + "0]}",
    lambda: '{"x": {' + '"a":0,' * VALUES + '"b":0}}',
    lambda: "[" + "1," * VALUES + "1]",
]


@pytest.mark.parametrize("body", FULL)
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "values"}])
def test_more_values_than_any_request_needs_are_not_parsed(
    http: httpx.Client, body: Callable[[], str], headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was parsed")

    with monkeypatch.context() as patched:
        patched.setattr("starlette.requests.json.loads", parsed)
        answer = http.post(
            "/v1/completions", content=body(), headers={"Content-Type": "application/json", **headers}
        )
    error = json.loads(answer.content)["error"]
    assert (answer.status_code, error["code"]) == (413, "body_too_large")
    assert f"the limit is {VALUES} commas" in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 1_000_000 + "}", "integer of more than 4300 digits"),
        ('{"prompt": "a", "temperature": 0.' + "9" * 1_000_000 + "e999999}", "temperature"),
        ('{"prompt": "' + "\\ud800" * 1_000_001 + '"}', "the limit is 1000000"),
        ('{"prompt": "' + "a" * 15_000_000 + '"}', "the limit is 1000000"),
    ],
)
def test_depth_digits_and_length(house: ApiHouse, http: httpx.Client, body: str, words: str) -> None:
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
