"""What the server holds a request to: size, origin, deadline, and what its key may use."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_house import EOS, VOCAB_SIZE, ApiHouse
from house import EngineShape

from headrace.api.errors import ApiError
from headrace.api.quota import KeyRing
from headrace.config import ApiKey, ServingOptions, read_keys

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ORIGIN = "https://page.example"
LONG = {"prompt": [300], "max_tokens": 90_000, "ignore_eos": True}
SLOW = EngineShape(
    max_model_len=100_000,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    num_blocks=30_000,
    step_s=0.01,
    max_num_seqs=1,
)


@pytest.fixture(scope="module")
def strict() -> Iterator[ApiHouse]:
    options = ServingOptions(
        keys=(ApiKey("one", hashlib.sha256(b"k1").digest(), concurrent_requests=1),),
        cors_origins=(ORIGIN,),
        max_body_bytes=5000,
        max_prompt_characters=100,
    )
    with ApiHouse(SLOW, serving=options) as house:
        yield house
        house.assert_quiet()


@pytest.fixture
def keyed(strict: ApiHouse) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer k1"}
    with httpx.Client(base_url=strict.url, timeout=20, headers=headers) as client:
        yield client
    strict.assert_quiet()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---- size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "big"}])
def test_a_large_body_is_refused_whether_or_not_it_says_how_large_it_is(
    keyed: httpx.Client, headers: dict[str, str]
) -> None:
    body = b'{"prompt": "' + b"a" * 6000 + b'"}'

    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 1000] for at in range(0, len(body), 1000))

    contents: tuple[Any, ...] = (body, pieces())
    for content in contents:
        answer = keyed.post(TEXT, content=content, headers={"Content-Type": "application/json", **headers})
        error = error_of(answer, 413)
        assert error["code"] == "body_too_large"
        assert "the limit is 5000 bytes" in error["message"]
        assert answer.headers["connection"] == "close"
    assert keyed.post(TEXT, json={"prompt": "a" * 90, "max_tokens": 1}).status_code == 200


def test_a_large_body_is_refused_before_it_is_sent(strict: ApiHouse) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def raw_answer(house: ApiHouse, *parts: bytes) -> tuple[bytes, float]:
    """All that comes back for what is sent, until the server closes without a reset, and after how long."""
    with socket.create_connection(("127.0.0.1", house.port), timeout=10) as connection:
        began = time.monotonic()
        for part in parts:
            connection.sendall(part)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer, time.monotonic() - began


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WITH_KEY = b"Authorization: Bearer k1\r\n"


def test_the_rest_of_a_large_body_without_a_length_is_drained(strict: ApiHouse) -> None:
    """Else the close would be a reset, which takes the answer with it."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    parts = [HEAD + WITH_KEY + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 200, b"0\r\n\r\n"]
    answer, _ = raw_answer(strict, *parts)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.count(b"body_too_large") == 1


@pytest.mark.parametrize("more", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n"])
@pytest.mark.parametrize("idempotent", [b"", b"Idempotency-Key: stuck\r\n"])
def test_a_body_that_stops_coming_is_a_408_and_the_connection_is_closed(
    strict: ApiHouse, monkeypatch: pytest.MonkeyPatch, more: bytes, idempotent: bytes
) -> None:
    monkeypatch.setattr("headrace.api.bodies.BODY_GAP_S", 0.2)
    monkeypatch.setattr("headrace.api.bodies.LINGER_S", 0.1)
    answer, took_s = raw_answer(strict, HEAD + WITH_KEY + idempotent + more)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert b"x-should-retry" not in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "body_incomplete"
    assert "none for 0.2 s" in error["message"]
    assert 0.2 <= took_s < 2


def test_who_has_no_key_holds_no_connection_with_a_body_either(
    strict: ApiHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.api.bodies.LINGER_S", 0.1)
    answer, took_s = raw_answer(strict, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer.lower()
    assert took_s < 2


def test_a_refusal_of_a_body_that_is_there_keeps_the_connection(strict: ApiHouse) -> None:
    with httpx.Client(base_url=strict.url) as http:
        assert "connection" not in http.post(TEXT, json={"prompt": "a"}).headers


def test_a_long_text_is_refused_before_it_is_tokenised(keyed: httpx.Client) -> None:
    for path, body, field in (
        (TEXT, {"prompt": "a" * 101}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 101}]}, "messages"),
        ("/tokenize", {"prompt": "a" * 101}, "prompt"),
    ):
        error = error_of(keyed.post(path, json=body), 400)
        assert error["param"] == field
        assert "the limit is 100" in error["message"]


# ---- origins -----------------------------------------------------------------------------------------


def test_pages_of_the_named_origin_may_call_and_no_others(strict: ApiHouse, http: httpx.Client) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = httpx.options(strict.url + CHAT, headers={"Origin": ORIGIN, **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert allowed.headers["access-control-allow-headers"] == "authorization"
    refused = httpx.options(strict.url + CHAT, headers={"Origin": "https://other.example", **ask})
    assert "access-control-allow-origin" not in refused.headers
    assert "'https://other.example' may not call" in error_of(refused, 400)["message"]
    ask["Access-Control-Request-Method"] = "DELETE"
    refused = httpx.options(strict.url + CHAT, headers={"Origin": ORIGIN, **ask})
    assert "GET and POST" in error_of(refused, 400)["message"]
    # An error can be read by the page as well.
    assert httpx.get(f"{strict.url}/v1/models", headers={"Origin": ORIGIN}).headers[
        "access-control-allow-origin"
    ]
    answer = http.get("/health", headers={"Origin": ORIGIN})  # a server where none was named
    assert "access-control-allow-origin" not in answer.headers


def test_pages_may_send_what_client_libraries_send_and_read_what_they_look_for(strict: ApiHouse) -> None:
    asked = "authorization,content-type,openai-organization,openai-project,x-stainless-arch,x-stainless-os"
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    allowed = httpx.options(strict.url + CHAT, headers={"Origin": ORIGIN, **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-headers"] == asked
    answer = httpx.get(f"{strict.url}/health", headers={"Origin": ORIGIN})
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    others = {"Retry-After", "Idempotent-Replayed", "X-Should-Retry", "X-Request-Id"}
    assert exposed == {"X-Headrace-Degraded", "X-Headrace-Model", *others}


def test_an_answer_is_replayed_to_the_origin_that_asks(keyed: httpx.Client) -> None:
    headers = {"Idempotency-Key": "page"}
    first = keyed.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers={**headers, "Origin": ORIGIN})
    assert first.headers["vary"] == "Origin"
    again = keyed.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers={**headers, "Origin": ORIGIN})
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["vary"] == "Origin"
    program = keyed.post(TEXT, json={"prompt": "a", "max_tokens": 1}, headers=headers)
    assert program.headers["idempotent-replayed"] == "true"
    assert "access-control-allow-origin" not in program.headers


# ---- deadlines ---------------------------------------------------------------------------------------


def test_a_request_ends_at_its_deadline_and_frees_the_engine(strict: ApiHouse, keyed: httpx.Client) -> None:
    for body, headers in (
        ({**LONG, "timeout": 0.2}, {}),
        (LONG, {"X-Request-Timeout": "0.2"}),
        ({**LONG, "timeout": 60}, {"X-Request-Timeout": "0.2"}),
    ):
        answer = keyed.post(TEXT, json=body, headers=headers)
        error = error_of(answer, 408)
        assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        assert "0.2 s" in error["message"]
        assert answer.headers["x-should-retry"] == "false"
        strict.assert_quiet()


def test_a_stream_is_told_of_its_deadline_in_the_stream(keyed: httpx.Client) -> None:
    lines = keyed.post(TEXT, json={**LONG, "timeout": 0.3, "stream": True}).text.splitlines()
    data = [line[6:] for line in lines if line]
    assert json.loads(data[0])["choices"]
    assert json.loads(data[-2])["error"]["code"] == "deadline_exceeded"
    assert data[-1] == "[DONE]"


def test_a_deadline_counts_while_a_request_waits() -> None:
    with ApiHouse(SLOW) as house, httpx.Client(base_url=house.url, timeout=20) as http:
        with http.stream("POST", TEXT, json={**LONG, "stream": True}) as running:
            lines = running.iter_lines()  # closing it would be leaving
            next(lines)
            for stream in (False, True):
                answer = http.post(TEXT, json={**LONG, "timeout": 0.2, "stream": stream})
                assert error_of(answer, 408)["param"] == "timeout"
            deadline = time.monotonic() + 5
            while house.gateway.open_samples > 1:  # the engine is told, and answers with the ending
                assert time.monotonic() < deadline
                time.sleep(0.005)
        house.assert_quiet()


def test_the_server_has_a_deadline_of_its_own() -> None:
    with ApiHouse(SLOW, serving=ServingOptions(request_timeout_s=0.2)) as house:
        assert "0.2 s" in error_of(httpx.post(house.url + TEXT, json={**LONG, "timeout": 9}), 408)["message"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1e400", "86401"])
def test_a_deadline_that_is_none(keyed: httpx.Client, text: str) -> None:
    error = error_of(keyed.post(TEXT, json=LONG, headers={"X-Request-Timeout": text}), 400)
    assert error["param"] == "X-Request-Timeout"


def test_a_client_of_openai_does_not_repeat_what_timed_out(strict: ApiHouse) -> None:
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="k1", max_retries=3) as client:
        began = time.monotonic()
        with pytest.raises(openai.APIStatusError) as timed_out:
            client.completions.create(model="hash", prompt=[300], max_tokens=900, extra_body={"timeout": 0.3})
        assert timed_out.value.status_code == 408
        assert time.monotonic() - began < 1.0


def test_a_client_of_openai_shows_the_id_of_answers_and_of_errors(strict: ApiHouse) -> None:
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="k1", max_retries=0) as client:
        answer = client.completions.create(model="hash", prompt=[300], max_tokens=1)
        assert answer.id == f"cmpl-{answer._request_id}"
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model="hash", prompt=[300], max_tokens=0)
        assert refused.value.request_id not in (None, answer._request_id)


# ---- what a key may use ------------------------------------------------------------------------------


def test_a_key_runs_so_many_requests_at_once(strict: ApiHouse, keyed: httpx.Client) -> None:
    with keyed.stream("POST", TEXT, json={**LONG, "stream": True}) as running:
        lines = running.iter_lines()  # closing it would be leaving
        next(lines)
        refused = keyed.post(TEXT, json=LONG)
        error = error_of(refused, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "may run 1 requests at once" in error["message"]
        assert refused.headers["retry-after"] == "1"
        assert keyed.post("/tokenize", json={"prompt": "a"}).status_code == 200
    strict.assert_quiet()
    assert keyed.post(TEXT, json={**LONG, "max_tokens": 1}).status_code == 200


def test_what_the_doors_refuse_has_an_id_too(strict: ApiHouse, keyed: httpx.Client) -> None:
    answers = [
        httpx.post(strict.url + TEXT, json=LONG, headers={"Authorization": "Bearer wrong"}),
        keyed.post(TEXT, json=LONG, headers={"Idempotency-Key": "no spaces"}),
        keyed.post(TEXT, content=b"x" * 20_000_000),
    ]
    assert [answer.status_code for answer in answers] == [401, 400, 413]
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 3


def test_rates_are_refused_with_when_to_come_again() -> None:
    keys = (
        ApiKey("slow", hashlib.sha256(b"a").digest(), requests_per_minute=2),
        ApiKey("small", hashlib.sha256(b"b").digest(), tokens_per_minute=10),
    )
    with ApiHouse(serving=ServingOptions(keys=keys)) as house:

        def ask(key: str, prompt: list[int], max_tokens: int) -> httpx.Response:
            body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
            return httpx.post(house.url + TEXT, json=body, headers={"Authorization": f"Bearer {key}"})

        assert [ask("a", [5], 1).status_code for _ in range(2)] == [200, 200]
        refused = ask("a", [5], 1)
        assert "'slow' may use 2 requests per minute" in error_of(refused, 429)["message"]
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        found = house.server().gateway.journeys.of(refused.headers["X-Request-Id"])
        assert [(one.what, one.detail["why"]) for one in found[0].entries] == [
            ("refused", error_of(refused, 429)["message"])
        ]
        assert error_of(ask("b", [5] * 11, 1), 400)["code"] == "rate_limit_exceeded"
        assert ask("b", [5] * 4, 16).status_code == 200  # 4 + 16: 10 too many
        refused = ask("b", [5], 1)
        assert "10 tokens per minute" in error_of(refused, 429)["message"]
        assert 60 <= int(refused.headers["retry-after"]) <= 66
        assert ask("a", [5], 1).status_code == 429


def test_an_answer_that_is_sent_again_is_a_request() -> None:
    keys = (ApiKey("k", hashlib.sha256(b"k").digest(), requests_per_minute=3, tokens_per_minute=10),)
    with ApiHouse(serving=ServingOptions(keys=keys)) as house:
        headers = {"Authorization": "Bearer k", "Idempotency-Key": "again"}
        body = {"prompt": [5] * 6, "max_tokens": 4, "ignore_eos": True}
        answers = [httpx.post(house.url + TEXT, json=body, headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert "3 requests per minute" in error_of(answers[-1], 429)["message"]
    assert answers[0].content == answers[2].content


def test_budgets_fill_with_time() -> None:
    now = 0.0
    key = ApiKey("k", hashlib.sha256(b"k").digest(), requests_per_minute=60, tokens_per_minute=600)
    caller = KeyRing([key], lambda: now).caller_of(b"Bearer k")

    def waits(ask: Callable[[], Any]) -> int:
        with pytest.raises(ApiError) as refused:
            ask()
        assert refused.value.status == 429
        return refused.value.retry_after_s

    for _ in range(60):
        caller.admit_small()
    assert waits(caller.admit_small) == 1
    now = 2.0
    caller.admit_small()
    caller.admit_small()
    waits(caller.admit_small)
    now = 1000.0  # never more than one minute's worth
    admission = caller.admit(500)
    admission.close(700)
    admission.close(700)
    assert waits(lambda: caller.admit(1)) == 61
    now = 1061.0
    caller.admit(10).close(-10)  # what was refused later on is given back
    assert waits(lambda: caller.admit(11)) == 1
    assert caller.running == 0


def test_keys_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"two").hexdigest()
    path.write_text(
        f'[[keys]]\nname = "a"\nkey = "one"\ntokens_per_minute = 5\n'
        f'[[keys]]\nname = "b"\nsha256 = "{digest}"\n'
    )
    keys = read_keys(path)
    assert keys[0].tokens_per_minute == 5
    ring = KeyRing(keys, time.monotonic)
    assert ring.caller_of(b"Bearer one").name == "a"
    assert ring.caller_of(b"bearer two").name == "b"
    for wrong in (b"Bearer three", b"Basic one", b"one", b"Bearer ", b"Bearer onetwo"):
        with pytest.raises(ApiError, match="wrong"):
            ring.caller_of(wrong)
    assert "'a'" not in repr(ServingOptions(keys=keys))
    assert "'one'" not in repr(keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing required field `keys`"),
        ("keys = []", "has no"),
        ('[[keys]]\nname = "a"', "either `key` or `sha256`"),
        ('[[keys]]\nname = "a"\nkey = "x"\nsha256 = "y"', "either `key` or `sha256`"),
        ('[[keys]]\nname = "a"\nsha256 = "abc"', "64 hexadecimal digits"),
        ('[[keys]]\nname = "a"\nkey = "x y"', "spaces"),
        ('[[keys]]\nname = "a"\nkey = "x"\nrpm = 5', "rpm"),
        ('[[keys]]\nname = "a"\nkey = "x"\nrequests_per_minute = 0', "at least 1"),
        ("[[", "is not a file of API keys"),
    ],
)
def test_what_is_wrong_with_a_file_of_keys(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_keys(path)


def test_options_that_cannot_be() -> None:
    key = ApiKey.of("secret", "a")
    for options in (
        {"keys": (key, ApiKey.of("other", "a"))},
        {"keys": (key, ApiKey.of("secret", "b"))},
        {"max_body_bytes": 0},
        {"request_timeout_s": 0.0},
    ):
        with pytest.raises(ValueError, match=r"key|at least|above 0") as wrong:
            ServingOptions(**options)
        assert "secret" not in str(wrong.value)
