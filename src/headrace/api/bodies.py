"""Keeps bodies within limits of size and of values, before they are read whole, and of time.

In: every HTTP request. Out: the same, or a 413, or a 408. One layer around the application, outside the one
that asks for keys. What goes out is looked at only as long as the body has not come whole, so a stream of
tokens costs nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api.errors import ApiError

LINGER_S = 2.0
"""How long what is left of a refused body is read and thrown away. A connection closed with bytes unread is
reset, and the client would lose the answer that explains it."""

IN_FLIGHT_S = 0.1
"""How long an answer waits for a body that nobody needs, such as that of a request without a key. Most
clients send head and body in two pieces; one whose body comes in this time keeps its connection."""

BODY_GAP_S = 60.0
"""How long a body may go without another byte. A client that sends none any more holds a connection, with or
without a key, and would hold it forever."""


SEPARATORS = (b",", b"[", b"{")
"""A value in JSON stands at the start of the body or after one of these or a colon, whose comma or brace is
counted. They are counted in texts as well, since nothing is parsed here."""


class BodyLimit:
    """ASGI middleware that refuses bodies of more than `max_bytes`, and those that stop coming.

    And those with more than `max_values` commas, brackets and braces: a value of two bytes in JSON takes some
    hundred bytes of memory, and the time to make it, however soon it is refused.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_values: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_values = max_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (length := _announced(scope)):
            await self._app(scope, receive, send)
            return
        body = _Incoming(scope, receive, send, self._max_bytes, self._max_values)
        if length > self._max_bytes:
            refused = ApiError.of_status(413, body.too_large()).response(scope)
            await refused(scope, body.receive, body.send)
        else:
            await self._app(scope, body.receive, body.send)


class _Incoming:
    """One body on its way in, and the answer if it comes before the body is whole."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int, max_values: int) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._total = 0
        self._values = 0
        self._whole = False
        self._waits_for_leave = any(name == b"expect" for name, _ in scope["headers"])

    def too_large(self) -> str:
        return f"the body is too large: the limit is {self._max_bytes} bytes"

    async def receive(self) -> Message:
        """The next message. HTTPException is the application's own way out of reading."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_GAP_S):
                message = await self._next()
        except TimeoutError:
            raise HTTPException(
                408,
                f"the body did not come whole: {self._total} bytes, and then none for {BODY_GAP_S:g} s; "
                "send it again",
            ) from None
        if self._total > self._max_bytes:
            raise HTTPException(413, self.too_large())
        if self._values > self._max_values:
            raise HTTPException(
                413,
                "the body has too many values: the limit is "
                f"{self._max_values} commas, brackets and braces, those in texts included",
            )
        return message

    def send(self, message: Message) -> Awaitable[None]:
        return self._send(message) if self._whole else self._send_early(message)

    async def _send_early(self, message: Message) -> None:
        """Answer what has not come whole, and close: what comes after it is no request."""
        if message["type"] == "http.response.start":
            if not self._waits_for_leave:
                await self._discard(IN_FLIGHT_S)
            if not self._whole:
                message = {**message}
                MutableHeaders(scope=message)["Connection"] = "close"
            await self._send(message)
        elif message.get("more_body", False):
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._discard(LINGER_S)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard(self, within_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._whole:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        body = message.get("body", b"")
        self._total += len(body)
        if self._values <= self._max_values:
            self._values += sum(map(body.count, SEPARATORS))
        self._whole = not message.get("more_body", False)  # also when the client has left
        return message


def _announced(scope: Scope) -> int:
    """Bytes that are to come: 0 without a body, 1 for one that does not say how long it is."""
    chunked = 0
    for name, value in scope["headers"]:
        if name == b"content-length":
            # The HTTP parser has refused what is no number; one too long to be read is too large as well.
            return int(value) if len(value) <= 18 else 1 << 62
        if name == b"transfer-encoding":
            chunked = 1
    return chunked
