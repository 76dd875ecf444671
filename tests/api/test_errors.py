"""What is refused, with which status, which words and which field."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import openai
import pytest
from api_house import EOS, TEMPLATE, VOCAB_SIZE, ApiHouse, byte_tokenizer
from house import EngineShape

from headrace.api import ServedModel, Server, create_app
from headrace.api.errors import ApiError
from headrace.cluster import Gateway
from headrace.config import ApiKey, ServingOptions
from headrace.observe import Metrics
from headrace.text import ChatTemplate
from headrace.world import real_world

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
SHAPE = EngineShape(
    max_model_len=100_000,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    num_blocks=30_000,
    step_s=0.01,
    max_num_seqs=2,
    max_waiting=2,
)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", "required"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "may go without content"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools at the start"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text parts only",
        ),
        (CHAT, {**HELLO, "temperature": "warm"}, "temperature", "valid number, got the text 'warm'"),
        (CHAT, {**HELLO, "temperature": -1}, "temperature", "from 0.0 to 100.0"),
        (CHAT, {**HELLO, "top_p": 0}, "top_p", "above 0"),
        (CHAT, {**HELLO, "n": 0}, "n", "from 1 to 64"),
        (CHAT, {**HELLO, "n": 1.5}, "n", "integer"),
        (CHAT, {**HELLO, "n": True}, "n", "integer"),
        (CHAT, {**HELLO, "max_tokens": 0}, "max_tokens", "must be at least 1, got 0"),
        (CHAT, {**HELLO, "max_tokens": "8"}, "max_tokens", "an integer of at least 1, got the text '8'"),
        (CHAT, {**HELLO, "max_completion_tokens": 0.5}, "max_completion_tokens", "got the number 0.5"),
        (CHAT, {**HELLO, "max_tokens": True}, "max_tokens", "integer of at least 1, got true"),
        (CHAT, {**HELLO, "max_completion_tokens": -5}, "max_tokens", "must be at least 1, got -5"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "must be at least 1"),
        (
            CHAT,
            {"messages": [{"role": "wizard", "content": "a"}]},
            "messages[0].role",
            "the roles are system",
        ),
        (CHAT, {**HELLO, "stream": "yes"}, "stream", "valid boolean"),
        (CHAT, {**HELLO, "model": 5}, "model", "valid string"),
        (CHAT, {**HELLO, "top_p": 1.01}, "top_p", "at most 1"),
        (CHAT, {**HELLO, "top_p": -0.1}, "top_p", "above 0"),
        (CHAT, {**HELLO, "min_p": 1.5}, "min_p", "from 0.0 to 1.0"),
        (CHAT, {**HELLO, "n": 1 << 40}, "n", "from 1 to 64"),
        (CHAT, {**HELLO, "n": 65}, "n", "from 1 to 64"),
        (CHAT, {**HELLO, "presence_penalty": 2.5}, "presence_penalty", "from -2.0 to 2.0"),
        (CHAT, {**HELLO, "frequency_penalty": -3}, "frequency_penalty", "from -2.0 to 2.0"),
        (CHAT, {**HELLO, "repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100"),
        (CHAT, {**HELLO, "logit_bias": {"5": 101}}, "logit_bias", "from -100.0 to 100.0"),
        (CHAT, {**HELLO, "prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
        (CHAT, {**HELLO, "stop": [""]}, "stop", "1 to 1024"),
        (CHAT, {**HELLO, "stop": "x" * 1025}, "stop", "1 to 1024"),
        (CHAT, {**HELLO, "cache_salt": "x" * 257}, "cache_salt", "the limit is 256"),
        (CHAT, {**HELLO, "timeout": 0}, "timeout", "greater than 0"),
        (CHAT, {**HELLO, "timeout": "1s"}, "timeout", "valid number"),
        (CHAT, {**HELLO, "guided_json": {}}, "guided_json", "not served"),
        (CHAT, {**HELLO, "chat_template": "x"}, "chat_template", "not served"),
        (CHAT, {**HELLO, "continue_final_message": True}, "continue_final_message", "not served"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "the limit is 511"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_000_001}]}, "messages", "limit is 1000000"),
        (TEXT, {"prompt": "a" * 1_000_001}, "prompt", "the limit is 1000000"),
        (TEXT, {"prompt": ["a" * 600_000] * 2}, "prompt", "the limit is 1000000"),
        (TEXT, {"prompt": ["a", "\ud800"]}, "prompt", "surrogate"),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
        ("/tokenize", {}, None, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", **HELLO}, None, "either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools at the start"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", "surrogate"),
        ("/detokenize", {}, "tokens", "required"),
        ("/detokenize", {"tokens": [1, 1000]}, "tokens[1]", "outside the vocabulary of 1000"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "outside the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "valid integer"),
        (CHAT, {**HELLO, "stop": ""}, "stop", "1 to 1024"),
        (CHAT, {**HELLO, "stop": ["x"] * 65}, "stop", "the limit is 64"),
        (CHAT, {**HELLO, "logit_bias": {"a": 1}}, "logit_bias", "not a token id"),
        (CHAT, {**HELLO, "logit_bias": {"9" * 5000: 1}}, "logit_bias", "not a token id"),
        (CHAT, {**HELLO, "logit_bias": {"5000": 1}}, "logit_bias", "outside the vocabulary"),
        (CHAT, {**HELLO, "seed": 1 << 64}, "seed", "less than or equal"),
        (CHAT, {**HELLO, "priority": 1 << 40}, "priority", "less than or equal"),
        (CHAT, {**HELLO, "top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        (CHAT, {**HELLO, "tools": [{"type": "function"}]}, "tools", "not served"),
        (CHAT, {**HELLO, "response_format": {"type": "json_object"}}, "response_format.type", "not served"),
        (CHAT, {**HELLO, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "another field"),
        (CHAT, {**HELLO, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        (CHAT, {**HELLO, "cache_salt": "\ud800"}, "cache_salt", "Unicode"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        (TEXT, {}, "prompt", "required"),
        (TEXT, {"prompt": ""}, "prompt", "no tokens"),
        (TEXT, {"prompt": []}, "prompt", "empty"),
        (TEXT, {"prompt": [5, "a"]}, "prompt", "prompt[1] is the text 'a': texts and token ids are mixed"),
        (TEXT, {"prompt": ["a", [1]]}, "prompt", "prompt[1] is an array: texts and token ids are mixed"),
        (TEXT, {"prompt": ["a", 1]}, "prompt", "prompt[1] is the number 1: texts and token ids are mixed"),
        (TEXT, {"prompt": [[5], [6, "a"]]}, "prompt", "prompt[1][1] is the text 'a': texts and token ids"),
        (TEXT, {"prompt": [[5], 6]}, "prompt", "prompt[1] is the number 6: texts and token ids are mixed"),
        (TEXT, {"prompt": [True]}, "prompt", "prompt[0] is true; send a text, an array of texts"),
        (TEXT, {"prompt": [1, None]}, "prompt", "prompt[1] is null; send a text"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "got an object; send a text"),
        (TEXT, {"prompt": [[5], []]}, "prompt", "no tokens"),
        (TEXT, {"prompt": [5, 1000]}, "prompt[1]", "prompt[1] is the number 1000, outside the vocabulary of"),
        (TEXT, {"prompt": [5, 6, 7, -1]}, "prompt[3]", "outside the vocabulary of 1000"),
        (TEXT, {"prompt": [[5], [5, 10**30]]}, "prompt[1][1]", "outside the vocabulary of 1000"),
        (TEXT, {"prompt": [1] * 512}, "prompt", "the limit is 511"),
        (TEXT, {"prompt": ["a"] * 257}, "prompt", "the limit is 256"),
        (TEXT, {"prompt": ["a"] * 200, "n": 64}, "n", "at once"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "not served"),
        (TEXT, {"prompt": "a", "best_of": 3}, "best_of", "not served"),
        (TEXT, {"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens", "from 0 to 3"),
        (TEXT, {"prompt": "a", "stop_token_ids": [1000]}, "stop_token_ids", "outside the vocabulary"),
        (TEXT, {"prompt": "a", "top_k": -2}, "top_k", "at least 0, or -1 to keep all, got the number -2"),
    ],
)
def test_the_field_and_its_limit_are_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(http.post(path, content=_json(body), headers={"Content-Type": "application/json"}), 400)
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def _json(body: Any) -> bytes:
    import json

    return json.dumps(body).encode()


def test_bodies_that_are_no_object(http: httpx.Client) -> None:
    as_json = {"Content-Type": "application/json"}
    assert "not JSON" in error_of(http.post(CHAT, content=b"{", headers=as_json), 400)["message"]
    assert "not an object" in error_of(http.post(CHAT, content=b"[1]", headers=as_json), 400)["message"]
    assert "Content-Type is not given" in error_of(http.post(CHAT, content=b"{}"), 400)["message"]
    as_form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert "'application/x-www" in error_of(http.post(CHAT, content=b"{}", headers=as_form), 400)["message"]
    for content, words in (
        (b"", "the body is empty; send a JSON object"),
        (b"[" * 100_000, "nested too deeply: the limit is below"),
        (b'{"a": [' + b"9" * 5000 + b"]}", "an integer of more than 4300 digits at position 7"),
        (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at position 14"),
    ):
        error = error_of(http.post(CHAT, content=content, headers=as_json), 400)
        assert words in error["message"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_probe_may_ask_for_the_head_alone(http: httpx.Client, path: str) -> None:
    whole, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_nothing_there(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["message"] == "there is nothing at GET /v1/nothing"
    error_of(http.get(CHAT), 405)
    error = error_of(http.post(CHAT, json={**HELLO, "model": "gpt-5"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(http.get("/v1/models/gpt-5"), 404)


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=HELLO["messages"])  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="hash", prompt="a", temperature=1000)
    assert bad.value.param == "temperature"
    assert [model.id for model in client.models.list()] == ["hash"]


def test_a_key_is_asked_for_under_v1_only() -> None:
    with ApiHouse(serving=ServingOptions(keys=(ApiKey.of("sécret", "test"),))) as house:
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert httpx.get(house.url + path).status_code == 200
        assert error_of(httpx.get(f"{house.url}/v1/models"), 401)["code"] == "invalid_api_key"
        for given in ("Bearer wrong", "Bearer secret", "Bearer", "Bearer sécre", "sécret"):
            headers = {"Authorization": given.encode()}
            error_of(httpx.post(house.url + CHAT, json=HELLO, headers=headers), 401)
        good = {"Authorization": "Bearer sécret".encode()}
        assert httpx.post(house.url + TEXT, json={"prompt": "a"}, headers=good).status_code == 200


def test_full_dead_restarted_and_draining() -> None:
    async def hold(house: ApiHouse) -> list[tuple[int, str]]:
        """Four requests that fill the engine and its queue; what becomes of each."""
        async with httpx.AsyncClient(base_url=house.url, timeout=20) as http:
            body = {"prompt": "a", "max_tokens": 90_000, "ignore_eos": True}
            full = [asyncio.create_task(http.post(TEXT, json={**body, "n": 2})) for _ in range(2)]
            while house.gateway.open_samples < 4:
                await asyncio.sleep(0.01)
            for stream in (False, True):
                refused = await http.post(TEXT, json={**body, "stream": stream})
                error = error_of(refused, 429)
                assert error["type"] == "rate_limit_error"
                assert "the limit is 4" in error["message"]
                assert f"try again in {refused.headers['retry-after']} s" in error["message"]
            await asyncio.to_thread(house.kill_worker)
            return [(answer.status_code, answer.text) for answer in await asyncio.gather(*full)]

    with ApiHouse(SHAPE) as house:
        for status, text in asyncio.run(hold(house)):
            assert status == 503
            assert "send it again" in text
        for path in ("/health", "/ready"):
            assert httpx.get(house.url + path).status_code == 503
            assert httpx.head(house.url + path).status_code == 503
        error = error_of(httpx.post(house.url + CHAT, json=HELLO), 503)
        assert error["type"] == "service_unavailable_error"
        assert "no engine serves now" in error["message"]

        house.start_worker()
        assert httpx.get(f"{house.url}/ready").status_code == 200
        assert httpx.post(house.url + CHAT, json={**HELLO, "max_tokens": 2}).status_code == 200

        with httpx.stream(
            "POST", house.url + CHAT, json={**HELLO, "stream": True, "max_tokens": 30}
        ) as running:
            lines = running.iter_lines()
            next(lines)
            house.do(lambda: house.background.append(asyncio.create_task(house.gateway.drain(10.0))))
            assert "shutting down" in error_of(httpx.post(house.url + CHAT, json=HELLO), 503)["message"]
            assert httpx.get(f"{house.url}/ready").status_code == 503
            assert httpx.get(f"{house.url}/health").status_code == 200
            assert "data: [DONE]" in list(lines)  # what was accepted is finished


def test_an_engine_lost_in_the_middle_of_a_stream_is_an_event_in_it() -> None:
    with (
        ApiHouse(SHAPE) as house,
        openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="hash", prompt="a", max_tokens=90_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        house.kill_worker()
        with pytest.raises(openai.APIError, match="send it again"):
            for _ in stream:
                pass
        house.start_worker()


def test_a_model_without_a_chat_template_says_so() -> None:
    model = ServedModel("plain", byte_tokenizer(), None)
    server = Server(Gateway(real_world()), model, Metrics("plain", real_world().now), random.Random(0))
    transport = httpx.ASGITransport(create_app(server))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(CHAT, json=HELLO)

    assert "no chat template" in error_of(asyncio.run(ask()), 400)["message"]


def test_a_failure_of_our_own_is_a_500_without_details() -> None:
    class Broken(Gateway):
        def info_of(self, model: str) -> Any:
            raise ZeroDivisionError("a secret path")

    model = ServedModel("broken", byte_tokenizer(), ChatTemplate(TEMPLATE))
    server = Server(Broken(real_world()), model, Metrics("broken", real_world().now), random.Random(0))
    transport = httpx.ASGITransport(create_app(server), raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(CHAT, json=HELLO)

    assert "secret" not in error_of(asyncio.run(ask()), 500)["message"]


def test_error_objects_can_always_be_written() -> None:
    assert b"\\\\ud800" in ApiError(400, "a lone \ud800", param="\ud800").body()


WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 64, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "a", "1", "\ud800", "\x00", "<|sep|>", "x" * 2000, [], [1], ["a"], [[1]], [[]], [None],
    [1, "a"], {}, {"1": 1}, {"1": None}, {"\ud800": 1}, {"type": "text"}, [{"type": "text", "text": "a"}],
    [{"role": "user", "content": "a"}], [{"role": "user"}], [{"role": 1}], [{"role": "a", "content": [{}]}],
]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_no_body_makes_the_server_fail(house: ApiHouse, http: httpx.Client, seed: int) -> None:
    """Bodies with weird values in known fields: 200 or an error object that is the client's fault."""
    generator = random.Random(seed)
    properties = http.get("/openapi.json").json()["components"]["schemas"]
    for _ in range(60):
        path, schema, base = generator.choice(
            [
                (CHAT, "ChatCompletionRequest", {"messages": [{"role": "user", "content": "a"}]}),
                (TEXT, "CompletionRequest", {"prompt": "a"}),
            ]
        )
        body: dict[str, Any] = {**base, "max_tokens": 2}
        for name in generator.sample(sorted(properties[schema]["properties"]), generator.randrange(1, 4)):
            body[name] = generator.choice(WEIRD)
        answer = http.post(path, content=_json(body), headers={"Content-Type": "application/json"})
        if answer.status_code != 200:
            assert answer.status_code in (400, 404), f"{body} got {answer.status_code}: {answer.text}"
            error_of(answer, answer.status_code)
