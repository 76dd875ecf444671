"""The requests of a soak: what is sent, when it is cut off, and whether the answer is what it must be.

In: a seed. Out: requests, and for each answer what is wrong with it, if anything. It must not know
how many are under way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.bench.errors import RequestFailed
from headrace.bench.http import Answer, HttpClient

CANCELLED_SHARE = 0.05
MALFORMED_SHARE = 0.05
OUTPUT_TOKENS = (8, 64)
PROMPT_TOKENS = (4, 32)
REQUEST_TIMEOUT_S = 120.0

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ASK: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 8}


def _message(role: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "Hello"}], "max_tokens": 8}


_MALFORMED: list[tuple[str, bytes, int]] = [
    (_COMPLETIONS, b'{"prompt": "Once", ', 400),
    (_COMPLETIONS, b"[]", 400),
    (_COMPLETIONS, b"\xff\xfe", 400),
    *(
        (path, orjson.dumps(body), status)
        for path, body, status in (
            (_COMPLETIONS, {**_ASK, "prompt": {"text": 5}}, 400),
            (_COMPLETIONS, {**_ASK, "prompt": [10**7]}, 400),
            (_COMPLETIONS, {**_ASK, "prompt": [5] * 20_000}, 400),
            (_COMPLETIONS, {**_ASK, "n": 0}, 400),
            (_COMPLETIONS, {**_ASK, "max_tokens": 0}, 400),
            (_COMPLETIONS, {**_ASK, "max_tokens": "many"}, 400),
            (_COMPLETIONS, {**_ASK, "temperature": -1}, 400),
            (_COMPLETIONS, {**_ASK, "top_p": 0}, 400),
            (_COMPLETIONS, {**_ASK, "top_p": 1.5, "stream": True}, 400),
            (_COMPLETIONS, {**_ASK, "stop": ["x"] * 1000}, 400),
            (_COMPLETIONS, {**_ASK, "stop": ""}, 400),
            (_COMPLETIONS, {**_ASK, "model": "no-such-model"}, 404),
            (_CHAT, {**_message("user"), "model": "no-such-model", "stream": True}, 404),
            (_CHAT, _message("wizard"), 400),
            (_CHAT, {"messages": [], "max_tokens": 8}, 400),
            (_CHAT, {"messages": "Hello"}, 400),
        )
    ),
]


@dataclass(slots=True)
class Cut:
    """Where a client leaves: after so many bytes of the answer, or when its patience ends, if sooner."""

    after_bytes: int
    patience_s: float


@dataclass(slots=True)
class Ask:
    """One request. `status` is the one that its answer must have."""

    path: str
    body: bytes
    status: int = 200
    choices: int = 1
    stream: bool = False
    cut: Cut | None = None


class Workload:
    """Requests from a seed, one after another."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self, *, undisturbed: bool = False) -> Ask:
        """The next one; `undisturbed` ones are neither malformed nor cut off."""
        chance = 1.0 if undisturbed else self._random.random()
        if chance < MALFORMED_SHARE:
            return Ask(*self._random.choice(_MALFORMED))
        ask = self._well_formed()
        if chance < MALFORMED_SHARE + CANCELLED_SHARE:
            ask.cut = Cut(self._random.randrange(1, 8000), self._random.choice([0.0, 0.01, 0.1, 1.0, 10.0]))
        return ask

    def _well_formed(self) -> Ask:
        generator = self._random
        choices = generator.choice([1, 1, 1, 1, 1, 1, 1, 2])
        stream = generator.random() < 0.5
        body: dict[str, Any] = {
            "max_tokens": generator.randrange(*OUTPUT_TOKENS),
            "n": choices,
            "stream": stream,
            "temperature": generator.choice([0.0, 1.0]),
        }
        if generator.random() < 0.2:
            body["stop"] = [" the"]
        tokens = [generator.randrange(1000, 40_000) for _ in range(generator.randrange(*PROMPT_TOKENS))]
        if generator.random() < 0.5:
            path = _COMPLETIONS
            body["prompt"] = tokens
        else:
            path = _CHAT
            body["messages"] = [{"role": "user", "content": " ".join(f"w{token}" for token in tokens[:12])}]
        return Ask(path, orjson.dumps(body), choices=choices, stream=stream)


async def send(client: HttpClient, ask: Ask) -> str | None:
    """Send it and read the answer; returns what was wrong, or None. One that is cut off may have any 200."""
    answer = _CutAnswer(ask.cut)
    task = asyncio.create_task(client.post(ask.path, ask.body, answer))
    answer.leave = task.cancel
    patience_s = REQUEST_TIMEOUT_S if ask.cut is None else ask.cut.patience_s
    try:
        await asyncio.wait_for(task, patience_s)
    except (TimeoutError, asyncio.CancelledError):
        if ask.cut is None:
            return f"no whole answer within {REQUEST_TIMEOUT_S:g} s"
        return None if answer.status in (0, 200) else f"status {answer.status}"
    except RequestFailed as failure:
        return f"{failure}"
    if answer.status != ask.status:
        said = f"{bytes(answer.body[:300])!r} to {ask.body[:200]!r}"
        return f"status {answer.status}, expected {ask.status}: {said}"
    return check(ask, bytes(answer.body))


def check(ask: Ask, body: bytes) -> str | None:
    """What is wrong with a whole answer: each choice ends exactly once, an error says what is wrong."""
    try:
        if ask.status != 200:
            return None if orjson.loads(body)["error"]["message"] else "an error without a message"
        if not ask.stream:
            chunks = [orjson.loads(body)]
        else:
            *events, done, rest = body.split(b"\n\n")
            if done != b"data: [DONE]" or rest:
                return f"the stream ends with {body[-100:]!r}"
            chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
        ends = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error} in {body[:300]!r}"
    return None if sorted(ends) == list(range(ask.choices)) else f"endings of choices {ends} of {ask.choices}"


class _CutAnswer(Answer):
    """An answer whose reader may leave in the middle."""

    __slots__ = ("_cut", "leave")

    def __init__(self, cut: Cut | None) -> None:
        super().__init__()
        self._cut = cut
        self.leave: Callable[[], object] = lambda: None

    def piece(self, data: bytes, at: float) -> None:
        self.body += data
        if self._cut is not None and len(self.body) >= self._cut.after_bytes:
            self.leave()
