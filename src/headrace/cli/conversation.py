"""What a terminal chat remembers: the system prompt, what was said, and how fast the last answer came."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from headrace.bench.stream import StreamReader


class Said(msgspec.Struct):
    """One message."""

    role: Literal["user", "assistant"]
    content: str


class _File(msgspec.Struct):
    """A conversation on disk."""

    messages: list[Said]
    system: str | None = None
    model: str | None = None


@dataclass
class Conversation:
    """The messages so far; each request sends all of them."""

    model: str
    system: str | None = None
    messages: list[Said] = field(default_factory=list)

    def for_request(self) -> list[dict[str, str]]:
        """The messages as the API takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *({"role": said.role, "content": said.content} for said in self.messages)]

    def save(self, path: Path) -> None:
        """Raises OSError."""
        content = msgspec.json.encode(_File(self.messages, self.system, self.model))
        path.write_bytes(msgspec.json.format(content, indent=1) + b"\n")

    def load(self, path: Path) -> None:
        """Replace what was said and the system prompt. Raises OSError; ValueError for another file."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_File)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is no saved conversation: {error}") from None
        self.messages, self.system = found.messages, found.system


@dataclass(frozen=True)
class Speed:
    """Of one answer. Times in seconds, lengths in tokens."""

    ttft_s: float
    tokens: int
    tokens_per_s: float | None
    """After the first chunk; None for an answer of one."""
    context: int | None
    """Tokens in the context after the answer; None where the server does not say."""

    @classmethod
    def of(cls, answer: StreamReader) -> Speed | None:
        """None for an answer of which nothing came."""
        if answer.sent_s is None or not answer.times:
            return None
        sizes = answer.sizes()
        span_s = answer.times[-1] - answer.times[0]
        usage = answer.usage
        prompt_tokens = None if usage is None else usage.prompt_tokens
        return cls(
            ttft_s=answer.times[0] - answer.sent_s,
            tokens=sum(sizes),
            tokens_per_s=sum(sizes[1:]) / span_s if span_s > 0 else None,
            context=None if prompt_tokens is None else prompt_tokens + sum(sizes),
        )

    def __str__(self) -> str:
        rate = "" if self.tokens_per_s is None else f" at {self.tokens_per_s:.1f} tokens/s"
        context = "the server does not say how many" if self.context is None else f"{self.context}"
        return (
            f"first token after {self.ttft_s * 1e3:.0f} ms, {self.tokens} tokens{rate}; "
            f"tokens in the context: {context}"
        )
