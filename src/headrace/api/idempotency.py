"""Answers a retried request with its first answer: one run for each `Idempotency-Key`, however often it is
asked for.

In: POST requests with that header. Out: the recorded messages of the first run, from its first byte, also
while it still runs; a stream is replayed as a stream. It must not know what is answered.

    unknown ──first request──▶ RUNNING ──ended with 200──▶ KEPT ──TTL_S, or room is needed──▶ unknown
                                  └──any other end──▶ unknown     (so a retry after an error tries again)

A run with a key is nobody's connection: it goes on when its client leaves, since that client is about to ask
again. If nobody does for `Limits.grace_s`, it is cancelled. What runs is bounded by the engine's queue; what
is kept, by `Limits`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api.access import caller_of
from headrace.api.errors import FAILED, ApiError

HEADER = "Idempotency-Key"
REPLAYED = (b"idempotent-replayed", b"true")
MAX_KEY_CHARACTERS = 255
_NAME = HEADER.lower().encode()


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the answers that are kept. An answer too large for all of them together is not kept at all."""

    answers: int = 1024
    total_bytes: int = 64 << 20
    ttl_s: float = 600.0
    grace_s: float = 30.0
    """How long a run goes on that nobody waits for."""


@dataclass(eq=False)
class _Run:
    """One run and what it has sent. Whoever follows it waits for `grown`."""

    fingerprint: bytes
    messages: list[Message] = field(default_factory=list)
    size: int = 0
    ended_s: float | None = None
    error: Exception | None = None
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    followers: int = 0
    abandonment: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()

    def joined(self) -> _Run:
        """What is kept of a whole run: its body in one piece, for a stream's pieces weigh more than it."""
        body = b"".join(message.get("body", b"") for message in self.messages)
        messages = [self.messages[0], {"type": "http.response.body", "body": body}]
        return _Run(self.fingerprint, messages, self.size, self.ended_s)


class Idempotency:
    """ASGI middleware; within the one that asks for keys, so that callers share no answers."""

    def __init__(
        self, app: ASGIApp, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._limits = limits or Limits()
        self._clock = clock
        self._runs: dict[bytes, _Run] = {}  # the oldest ending first, what runs anywhere
        self._kept_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key_of(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self._app(scope, receive, send)
            return
        try:
            _check(key)
            body = await _body(receive)
            if body is None:
                return
            identity = _digest(_header(scope, b"authorization") or b"", scope["path"].encode(), key)
            run, replayed = self._find(scope, identity, body)
            if replayed and (caller := caller_of(scope)) is not None:
                caller.admit_small()  # an answer that is sent again is a request, though it generates nothing
        except ApiError as error:
            await error.response(scope)(scope, receive, send)
            return
        with self._following(run, identity):
            await _follow(run, receive, send, replayed)

    @contextmanager
    def _following(self, run: _Run, identity: bytes) -> Iterator[None]:
        """While inside, somebody waits for the run."""
        run.followers += 1
        if run.abandonment is not None:
            run.abandonment.cancel()
        try:
            yield
        finally:
            run.followers -= 1
            if run.followers == 0 and run.ended_s is None:
                loop = asyncio.get_running_loop()
                run.abandonment = loop.call_later(self._limits.grace_s, self._abandon, run, identity)

    def _abandon(self, run: _Run, identity: bytes) -> None:
        if run.ended_s is None and run.task is not None:
            del self._runs[identity]  # before it ends: who asks now begins anew
            run.task.cancel()

    def _find(self, scope: Scope, identity: bytes, body: bytes) -> tuple[_Run, bool]:
        """The run for a request, begun if there is none, and whether there was one."""
        self._forget()
        fingerprint = hashlib.sha256(body).digest()
        run = self._runs.get(identity)
        if run is None:
            run = self._runs[identity] = _Run(fingerprint)
            run.task = asyncio.create_task(self._execute(identity, run, scope, body), name="api.idempotent")
            return run, False
        if run.fingerprint != fingerprint:
            raise ApiError(
                422,
                f"this {HEADER} was used with another body; send another request with another key",
                param=HEADER,
                code="idempotency_key_reused",
            )
        return run, True

    async def _execute(self, identity: bytes, run: _Run, scope: Scope, body: bytes) -> None:
        """Run the application, and keep or forget what it answered."""
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                await asyncio.get_running_loop().create_future()  # this client never leaves
            return unread.pop()

        async def record(message: Message) -> None:
            run.messages.append(message)
            run.size += len(message.get("body", b""))
            run.tell()

        state = {**scope.get("state", {})}
        try:
            await self._app({**scope, "state": state}, receive, record)
        except Exception as error:  # raised again in everyone who follows, and there logged by the server
            run.error = error
        finally:
            run.ended_s = self._clock()
            run.tell()
            own = self._runs.get(identity, run) is run  # one that was abandoned has left its place to others
            if own:
                self._runs.pop(identity, None)
            whole = run.messages and not run.messages[-1].get("more_body", False)
            good = whole and run.messages[0].get("status") == 200 and not state.get(FAILED)
            if own and good and run.error is None and run.size <= self._limits.total_bytes:
                self._runs[identity] = run.joined()
                self._kept_bytes += run.size
                self._forget()

    def _forget(self) -> None:
        """Drop what is too old, and the oldest where it is too much."""
        now, limits = self._clock(), self._limits
        kept = [(identity, run) for identity, run in self._runs.items() if run.ended_s is not None]
        for number, (identity, run) in enumerate(kept):
            old = run.ended_s is not None and now - run.ended_s >= limits.ttl_s
            if not old and len(kept) - number <= limits.answers and self._kept_bytes <= limits.total_bytes:
                return
            del self._runs[identity]
            self._kept_bytes -= run.size


async def _follow(run: _Run, receive: Receive, send: Send, replayed: bool) -> None:
    """Send what a run has sent and sends, until it ends or this client leaves."""
    left = asyncio.create_task(_left(receive), name="api.follower")
    try:
        sent = 0
        while not left.done():
            while sent < len(run.messages):
                message = {**run.messages[sent]}  # the doors outside write into what is sent
                if replayed and message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], REPLAYED]}
                await send(message)
                sent += 1
            if run.ended_s is not None:
                break
            grown = asyncio.create_task(run.grown.wait())
            await asyncio.wait({grown, left}, return_when=asyncio.FIRST_COMPLETED)
            grown.cancel()
        if run.ended_s is not None and run.error is not None:
            raise run.error
    finally:
        left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the client left while it sent it."""
    parts = []
    while True:
        try:
            message = await receive()
        except HTTPException as error:  # the body's limits speak so to the application
            raise ApiError.of_status(error.status_code, error.detail) from None
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _check(key: bytes) -> None:
    if not (0 < len(key) <= MAX_KEY_CHARACTERS and all(0x21 <= character <= 0x7E for character in key)):
        raise ApiError(
            400,
            f"{HEADER} must have 1 to {MAX_KEY_CHARACTERS} printable ASCII characters and no spaces, "
            f"got {len(key)} bytes",
            param=HEADER,
        )


def _key_of(scope: Scope) -> bytes | None:
    return _header(scope, _NAME)


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for found, value in scope["headers"] if found == name), None)


def _digest(*parts: bytes) -> bytes:
    """One digest of several parts, each hashed first so that none can run into the next."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
