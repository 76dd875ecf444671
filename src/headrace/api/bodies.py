"""Keeps bodies within a limit, before they are read whole.

In: every HTTP request. Out: the same, or a 413. One layer around the application; it sees the messages that
come in and none that go out, so a stream of tokens costs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api.errors import ApiError

LINGER_S = 2.0
"""How long what is left of a refused body is read and thrown away. A connection closed with bytes unread is
reset, and the client would lose the answer that explains it."""


class BodyLimit:
    """ASGI middleware that refuses bodies of more than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _announced(scope) > self._max_bytes:
            await self._refuse(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                if total > self._max_bytes:
                    raise HTTPException(413, self._words())  # the application's own way out of reading
            return message

        return counted

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = ApiError(413, self._words(), code="body_too_large").response()
        await send({"type": "http.response.start", "status": 413, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _words(self) -> str:
        return f"the body is too large: the limit is {self._max_bytes} bytes"


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            # The HTTP parser has refused what is no number; one too long to be read is too large as well.
            return int(value) if len(value) <= 18 else 1 << 62
    return 0
