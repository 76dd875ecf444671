"""The OpenAPI document against the server: what it says may come back is all that does, whatever is sent."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from api_house import ApiHouse
from hypothesis import HealthCheck
from pydantic import BaseModel
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from headrace.api.answers import ChatAnswer, ChatChunk, TextAnswer, TextChunk, TokenizeAnswer
from headrace.config import ApiKey, ServingOptions

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    negative_data_rejection,
]
KEY = {"Authorization": "Bearer secret"}
EXAMPLES = 100
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
OPERATIONS = {
    "GET /health": (),
    "GET /ready": (),
    "GET /version": (),
    "GET /metrics": (),
    "GET /v1/models": (),
    "GET /v1/models/{name}": (404,),
    "POST /v1/chat/completions": (200, 400),
    "POST /v1/completions": (200, 400),
    "POST /tokenize": (400,),  # either prompt or messages: examples have both
    "POST /detokenize": (200, 400),
    "GET /cluster": (),
    "GET /cluster/requests/{request_id}": (404,),
    "POST /cluster/workers/{worker_id}/drain": (404,),
}
"""Every route, and statuses that examples are known to reach: the checks have something to look at."""
GOOD: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    "POST /v1/completions": {"prompt": [300], "max_tokens": 3},
}
"""Bodies that are answered whole: the few good ones that are made up may all ask for more than the deadline
lets them have."""


@pytest.fixture(scope="module")
def quick() -> Iterator[ApiHouse]:
    with ApiHouse(serving=ServingOptions(request_timeout_s=2.0)) as house:
        yield house
        house.assert_quiet()


def try_operation(
    url: str, label: str, modes: Sequence[Any], examples: int, checks: Sequence[Any], headers: dict[str, str]
) -> Counter[int]:
    """Call one operation with examples of each mode; how often each status came back."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().label == label)
    answered: Counter[int] = Counter()
    for mode in modes:

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def keeps(case: Any) -> None:
            answer = case.call(headers=headers, timeout=20)
            answered[answer.status_code] += 1
            case.validate_response(answer, headers=headers, checks=checks)

        keeps()
    if label in GOOD:
        case = operation.Case(body=GOOD[label], media_type="application/json")
        answer = case.call(headers=headers, timeout=20)
        answered[answer.status_code] += 1
        case.validate_response(answer, headers=headers, checks=checks)
    return answered


def test_every_operation_is_tried(quick: ApiHouse) -> None:
    schema = schemathesis.openapi.from_url(f"{quick.url}/openapi.json")
    assert {found.ok().label for found in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_an_operation_keeps_to_the_document(quick: ApiHouse, label: str) -> None:
    modes = (POSITIVE, NEGATIVE) if label.startswith("POST") else (POSITIVE,)
    answered = try_operation(quick.url, label, modes, EXAMPLES, CHECKS, {})
    assert answered.keys() >= set(OPERATIONS[label] or (200,)), answered


def test_the_key_is_asked_for_where_the_document_says_so() -> None:
    keys = (ApiKey("test", hashlib.sha256(b"secret").digest()),)
    with ApiHouse(serving=ServingOptions(keys=keys, request_timeout_s=2.0)) as house:
        for label in OPERATIONS:
            assert try_operation(house.url, label, (POSITIVE,), 2, [*CHECKS, ignored_auth], KEY)


@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, ChatAnswer, ChatChunk),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2, "n": 2},
            ChatAnswer,
            ChatChunk,
        ),
        ("/v1/completions", {"prompt": ["a", "b"], "stop_token_ids": [300]}, TextAnswer, TextChunk),
        ("/v1/completions", {"prompt": "ab", "logprobs": 2, "echo": True}, TextAnswer, TextChunk),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, TokenizeAnswer, None),
    ],
)
def test_answers_and_chunks_with_everything_in_them_are_as_documented(
    quick: ApiHouse, path: str, body: dict[str, Any], whole: type[BaseModel], chunk: type[BaseModel] | None
) -> None:
    more = {"max_tokens": 9, "prompt_logprobs": 2, "return_token_ids": True}
    whole.model_validate(httpx.post(quick.url + path, json={**body, **more}).json())
    if chunk is None:
        return
    more |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in httpx.post(quick.url + path, json={**body, **more}).text.splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    assert len(lines) > 2
    for line in lines:
        chunk.model_validate_json(line.removeprefix("data: "))
