"""The short way to the routes that generate answers as the application's own way does, right or wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import Response
from starlette.types import Message

from headrace.api.direct import Direct
from headrace.api.errors import ApiError, install_error_handlers

JSON = b"application/json"
REFUSED: list[str] = []
"""The ids of requests that were answered with an error on the short way."""


class Body(BaseModel):
    word: str = Field(max_length=3)
    fail: bool = False


def routes(seen: list[str]) -> APIRouter:
    router = APIRouter()

    @router.post("/say")
    async def say(body: Body, request: Request) -> Response:
        seen.append(body.word)
        if body.fail:
            raise ApiError(429, "not now", param="word", retry_after_s=7)
        return Response(body.word, headers={"X-Type": request.headers.get("content-type", "none")})

    return router


def both() -> Iterator[tuple[Any, list[str]]]:
    """The application with the short way, and without it."""
    for direct in (True, False):
        seen: list[str] = []
        app, router = FastAPI(), routes(seen)
        install_error_handlers(app)
        app.include_router(router)
        if direct:
            app.add_middleware(Direct, routers=[router], refused=lambda name, error: REFUSED.append(name))
        yield app, seen


def ask(app: Any, body: bytes, content_type: bytes | None, method: str = "POST") -> list[Message]:
    """What the application sends."""
    sent: list[Message] = []
    received = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append({**message, "headers": sorted(message.get("headers", []))})

    headers = [] if content_type is None else [(b"content-type", content_type)]
    scope = {
        "type": "http",
        "method": method,
        "path": "/say",
        "raw_path": b"/say",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"word": "abc"}', JSON),
        (b'{"word": "abc"}', b"Application/JSON; charset=utf-8"),
        (b'{"word": "abc"}', b"application/vnd.own+json"),
        (b'{"word": "abc"}', b"text/plain"),
        (b'{"word": "abc"}', None),
        (b'{"word": "abcd"}', JSON),
        (b'{"word": 3}', JSON),
        (b'{"wort": "abc"}', JSON),
        (b'["abc"]', JSON),
        (b"null", JSON),
        (b"{", JSON),
        (b"", JSON),
        (b"\xff{", JSON),
        (b'{"word": ' + b"1" * 5000 + b"}", JSON),
        (b"[" * 100_000, JSON),
        (b'{"word": "abc", "fail": true}', JSON),
    ],
)
def test_both_ways_answer_alike(body: bytes, content_type: bytes | None) -> None:
    (direct, seen), (whole, seen_there) = both()
    REFUSED.clear()
    answer = ask(direct, body, content_type)
    (named,) = [value for name, value in answer[0]["headers"] if name == b"x-request-id"]
    answer[0]["headers"].remove((b"x-request-id", named))
    assert answer == ask(whole, body, content_type)
    assert seen == seen_there
    status = answer[0]["status"]
    assert bool(REFUSED) == (status != 200)
    assert all(name == named.decode() for name in REFUSED)
    assert (status == 200) == (answer[1]["body"] == b"abc")
    if status != 200:
        assert json.loads(answer[1]["body"])["error"]["message"]


def test_other_methods_go_on_to_the_application() -> None:
    (direct, _), (whole, _) = both()
    answer = ask(direct, b"", None, "GET")
    assert answer == ask(whole, b"", None, "GET")
    assert answer[0]["status"] == 405
