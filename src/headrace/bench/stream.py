"""One streamed answer of an OpenAI-compatible server: chunks in as they arrive, times and tokens out.

In: the head and the pieces of an answer. Out: when tokens came, how many, what text, and what went wrong.
Usage is taken from the last chunk (`stream_options.include_usage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from headrace.bench.errors import FailureKind, RequestFailed
from headrace.bench.http import Receiver
from headrace.bench.record import Counted, share_out
from headrace.bench.sse import EventParser


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class StreamReader(Receiver):
    """Reads one streamed answer. `on_text(text, reasoning)` hears each piece as it arrives."""

    on_text: Callable[[str, bool], None] | None = None
    sent_s: float | None = None
    first_byte_s: float | None = None
    times: list[float] = field(default_factory=list)
    """When each chunk that carries tokens arrived."""
    counts: list[int] = field(default_factory=list)
    """Tokens of each as far as the server says, else 0."""
    lengths: list[int] = field(default_factory=list)
    """Characters of each."""
    text: list[str] = field(default_factory=list)
    token_ids: list[int] | None = None
    counted: Counted = Counted.TEXT
    finish_reason: str | None = None
    usage: _Usage | None = None
    status: int = 0
    _content_type: str = ""
    _body: bytearray = field(default_factory=bytearray)
    _events: EventParser = field(default_factory=EventParser)
    _done: bool = False
    _failed: RequestFailed | None = None
    _last_usage: int = 0

    def sent(self, at: float) -> None:
        self.sent_s = at

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self._content_type = headers.get("content-type", "")

    def piece(self, data: bytes, at: float) -> None:
        if self.first_byte_s is None:
            self.first_byte_s = at
        if self.status != 200 or "event-stream" not in self._content_type:
            if len(self._body) < 1 << 16:
                self._body += data
            return
        if self._failed is not None:
            return
        try:
            for event in self._events.feed(data):
                if event == b"[DONE]":
                    self._done = True
                else:
                    self._take(_decode(event), at)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._failed = RequestFailed(
                FailureKind.MALFORMED, f"an event of the stream is malformed: {error}"
            )

    def _take(self, chunk: _Chunk, at: float) -> None:
        if bytes(chunk.error) not in (b"", b"null"):
            self._failed = RequestFailed(FailureKind.REFUSED, error_text(chunk.error))
            return
        usage = chunk.usage
        if usage is not None:
            self.usage = usage
        for choice in chunk.choices:
            text, reasoning, silent = _text_of(choice)
            ids = choice.token_ids
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            if ids:
                self.token_ids = [] if self.token_ids is None else self.token_ids
                self.token_ids += ids
                self.counted = Counted.IDS
            if ids or text or silent:
                count = len(ids) if ids else 0
                if not ids and usage is not None and usage.completion_tokens is not None:
                    count = usage.completion_tokens - self._last_usage
                    self._last_usage = usage.completion_tokens
                    self.counted = Counted.USAGE
                self.times.append(at)
                self.counts.append(count)
                self.lengths.append(len(text))
            if text:
                self.text.append(text)
                if self.on_text is not None:
                    self.on_text(text, reasoning)

    def check(self) -> None:
        """Raise RequestFailed unless a whole answer with at least one token has been read."""
        if self.status != 200:
            raise RequestFailed(FailureKind.HTTP, error_text(bytes(self._body)), status=self.status)
        if "event-stream" not in self._content_type:
            raise RequestFailed(
                FailureKind.MALFORMED,
                f"a stream was asked for and {self._content_type or 'a body without content type'} came",
            )
        if self._failed is not None:
            raise self._failed
        if not self._done and self.finish_reason is None:
            raise RequestFailed(
                FailureKind.DISCONNECTED, "the stream ended without a finish reason or [DONE]"
            )
        if self._events.pending and not self._done:
            raise RequestFailed(FailureKind.MALFORMED, "the stream ended in the middle of an event")
        if not self.times:
            raise RequestFailed(FailureKind.EMPTY, "the answer had no token")

    def sizes(self) -> list[int]:
        """Tokens in each chunk, as exact as the server allows; see `Counted`."""
        total = self.usage.completion_tokens if self.usage is not None else None
        if total is None:
            if min(self.counts, default=0) > 0:
                return self.counts
            self.counted = Counted.CHUNKS
            return [1] * len(self.times)
        if min(self.counts, default=0) > 0 and sum(self.counts) == total:
            return self.counts
        self.counted = Counted.TEXT
        return share_out(total, self.lengths)


def _text_of(choice: _Choice) -> tuple[str, bool, bool]:
    """Text of a chunk, whether it is reasoning, and whether it is a token whose text is still held back.

    A delta that only opens the message with a role, or only closes it with a finish reason, is no token.
    """
    if choice.delta is None:
        return choice.text or "", False, choice.text == "" and choice.finish_reason is None
    delta = choice.delta
    reasoning = delta.reasoning_content or delta.reasoning or ""
    called = "".join(
        (call.function.name or "") + (call.function.arguments or "")
        for call in delta.tool_calls or ()
        if call.function is not None
    )
    text = delta.content or reasoning or called
    silent = delta.content == "" and delta.role is None and choice.finish_reason is None
    return text, bool(reasoning and not delta.content), silent


def error_text(body: bytes | msgspec.Raw) -> str:
    """The message of OpenAI's error object, or the beginning of whatever it is."""
    try:
        found: Any = orjson.loads(bytes(body))
    except orjson.JSONDecodeError:
        return bytes(body[:200]).decode("utf-8", "replace").strip() or "no body"
    if isinstance(found, dict):
        found = found.get("error", found)
    if isinstance(found, dict):
        found = found.get("message", found.get("detail", found))
    return str(found)[:500]
