"""What the live tests ask a server over HTTP, and everything of an answer that must not change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

_TEXT = "The harbour lights went out one by one, and the keeper wrote the hour of each into his book. "
TIMEOUT_S = 100.0


@dataclass
class Answer:
    """One sample's stream, put together: pieces may be cut anywhere, what they add up to may not differ."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)


def asks(kinds: int) -> list[dict[str, Any]]:
    """Bodies of completions: short and long prompts; stop strings, log-probabilities, two samples, seeds."""
    found: list[dict[str, Any]] = []
    for number in range(kinds):
        prompt = f"Question {number}. " + _TEXT * (0, 1, 4, 8)[number % 4] + "And then"
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": 8 + number % 9,
            "temperature": 0,
            "stream": True,
        }
        if number % 3 == 0:
            body["stop"] = [" the", "\n\n"]
        if number % 4 == 1:
            body["logprobs"] = 2
        if number % 5 == 2:
            body["n"] = 2
        if number % 6 == 5:
            body |= {"temperature": 0.8, "seed": number}
        found.append(body)
    return found


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> list[Answer]:
    """Send a body and read its stream to the end; raises AssertionError for an error or a second ending."""
    answers = [Answer() for _ in range(body.get("n", 1))]
    complete = False
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, (await response.aread(), body)
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not complete, "the stream goes on after its end"
            if line == "data: [DONE]":
                complete = True
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                answer = answers[choice["index"]]
                assert not answer.endings, "a sample goes on after its end"
                answer.text += choice["text"]
                if choice.get("logprobs"):
                    answer.tokens += choice["logprobs"]["tokens"]
                    answer.logprobs += choice["logprobs"]["token_logprobs"]
                if choice.get("finish_reason"):
                    answer.endings.append(choice["finish_reason"])
    assert complete, "the stream ended without its last word"
    assert all(len(answer.endings) == 1 for answer in answers), answers
    return answers
