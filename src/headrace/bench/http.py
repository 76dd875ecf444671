"""A lean HTTP/1.1 client: one request at a time on a connection, connections kept, bodies handed on as they
arrive.

In: requests as bytes. Out: status, headers and pieces of body, each with the time at which it left the
socket; no task is woken for a piece. It must not know what the bytes mean. Parsing is httptools' (the C
parser that uvicorn uses as well).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from headrace.bench.errors import BenchError, FailureKind, RequestFailed

CONNECT_TIMEOUT_S = 10.0

IDLE_S = 4.0
"""A connection unused for longer is not used again: servers close theirs after some seconds (uvicorn after
5).
"""

MAX_PLAIN_BODY_BYTES = 64 << 20
"""Limit on a body that is collected rather than handed on."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a server is, from its URL."""

    secure: bool
    host: str
    port: int
    path: str
    """Prefix of every path, without a trailing slash."""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Raises BenchError for what is not http:// or https:// with a host."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise BenchError(f"{url!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"{url!r} is not an address to ask; expected is http://HOST:PORT")
        if parts.username or parts.query or parts.fragment:
            raise BenchError(f"{url!r} has a user, query or fragment; expected is http://HOST:PORT[/PATH]")
        secure = parts.scheme == "https"
        return cls(secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.path}"


class Receiver:
    """Hears one answer. The methods are called from the socket's callback: they return at once, never
    raise.
    """

    def sent(self, at: float) -> None:
        """The request is handed to the socket. Again, when a kept connection turned out to be dead."""

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Status and headers, names in lower case."""

    def piece(self, data: bytes, at: float) -> None:
        """A piece of the body that was read from the socket at `at`."""


@dataclass(slots=True)
class Answer(Receiver):
    """Collects a whole answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def piece(self, data: bytes, at: float) -> None:
        if len(self.body) < MAX_PLAIN_BODY_BYTES:
            self.body += data


class HttpClient:
    """Talks to one origin. As many connections as requests under way; used on one event loop."""

    def __init__(
        self, origin: Origin, headers: dict[str, str] | None = None, *, now: Clock = time.perf_counter
    ) -> None:
        """`headers` go with every request. `now` gives the times that receivers hear, in seconds."""
        self.origin = origin
        self._now = now
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if origin.secure else None
        lines = {"host": origin.authority, "accept": "*/*", **(headers or {})}
        for name, value in lines.items():
            if not (name + value).isprintable() or not (name + value).isascii():
                raise BenchError(f"the header {name!r} has characters that HTTP does not allow")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def get(self, path: str) -> Answer:
        """The whole answer to a GET. Raises RequestFailed."""
        answer = Answer()
        await self._exchange(self._head("GET", path), answer)
        return answer

    async def post(self, path: str, body: bytes, receiver: Receiver) -> None:
        """Send a JSON body and return when the answer is complete. Raises RequestFailed.

        Cancelled, it closes the connection, which is how a server learns of it.
        """
        extra = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        await self._exchange(self._head("POST", path, extra) + body, receiver)

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _head(self, method: str, path: str, extra: str = "") -> bytes:
        return f"{method} {self.origin.path}{path} HTTP/1.1\r\n{self._headers}{extra}\r\n".encode("latin-1")

    async def _exchange(self, request: bytes, receiver: Receiver) -> None:
        while (kept := self._take_idle()) is not None:
            try:
                return await self._run(kept, request, receiver)
            except (
                _ClosedBeforeAnswer
            ):  # the server had given up the kept connection: not the request's fault
                continue
        connection = await self._connect()
        try:
            await self._run(connection, request, receiver)
        except _ClosedBeforeAnswer:
            raise RequestFailed(
                FailureKind.DISCONNECTED, f"{self.origin} closed the connection without an answer"
            ) from None

    async def _run(self, connection: _Connection, request: bytes, receiver: Receiver) -> None:
        try:
            keep = await connection.exchange(request, receiver)
        except BaseException:
            connection.abort()
            raise
        if keep:
            self._idle.append(connection)
        else:
            connection.abort()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and self._now() - connection.last_used < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._now), self.origin.host, self.origin.port, ssl=self._tls
                )
        except TimeoutError:
            raise RequestFailed(
                FailureKind.CONNECT,
                f"{self.origin} did not accept a connection within {CONNECT_TIMEOUT_S:g} s",
            ) from None
        except OSError as error:  # refused, unknown host, certificate, out of file descriptors
            why = error.strerror or str(error)
            raise RequestFailed(FailureKind.CONNECT, f"cannot connect to {self.origin}: {why}") from None
        return connection


class _ClosedBeforeAnswer(Exception):
    """The connection ended before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection and the exchange under way on it. The parser's callbacks have httptools' names."""

    def __init__(self, now: Clock) -> None:
        self._now = now
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bool] | None = None
        self._receiver = Receiver()
        self._headers: dict[str, str] = {}
        self._answering = False
        self._at = 0.0
        self.last_used = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def exchange(self, request: bytes, receiver: Receiver) -> asyncio.Future[bool]:
        """Send `request`; the future tells whether the connection can be used again."""
        self._done = asyncio.get_running_loop().create_future()
        if self._transport is None or self._transport.is_closing():
            self._done.set_exception(_ClosedBeforeAnswer())
            return self._done
        self._receiver = receiver
        self._parser = httptools.HttpResponseParser(self)
        self._headers = {}
        self._answering = False
        receiver.sent(self._now())
        self._transport.write(request)
        return self._done

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _end(self, outcome: bool | Exception) -> None:
        done, self._done = self._done, None
        self._receiver = Receiver()
        self.last_used = self._now()
        if done is None or done.done():
            return
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    # ---- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have the methods, not the type

    def data_received(self, data: bytes) -> None:
        self._at = self._now()
        if self._done is None:  # nothing was asked: whatever this is, the next answer would not be ours
            self.abort()
            return
        self._answering = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._malformed("an upgrade to another protocol")
        except httptools.HttpParserError as error:
            self._malformed(str(error))

    def _malformed(self, why: str) -> None:
        self._end(RequestFailed(FailureKind.MALFORMED, f"the answer is not HTTP/1.1: {why}"))
        self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is None:
            return
        if not self._answering:
            self._end(_ClosedBeforeAnswer())
        elif error is None and self._headers and self._unbounded:
            self._end(False)
        else:
            why = f": {error}" if error else ""
            self._end(RequestFailed(FailureKind.DISCONNECTED, f"the connection ended in the answer{why}"))

    @property
    def _unbounded(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return "content-length" not in self._headers and "transfer-encoding" not in self._headers

    # ---- httptools -----------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._receiver.head(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        self._receiver.piece(body, self._at)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:  # what is below announces the answer
            self._end(self._parser.should_keep_alive())
