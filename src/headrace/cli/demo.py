"""`headrace demo`: a small model, a real server, and the official client talking to it.

What a stranger would do in the first five minutes, timed: a streamed chat, a completion, a question about a
long text, and eight requests at once. The server is the one that `headrace serve` starts, in a process of its
own, with one worker that prefills and one that decodes: the table shows where each request went.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.cluster import ask
from headrace.cli.errors import clear_errors
from headrace.cli.private_server import private_server

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from rich.console import Console

REQUEST_TIMEOUT_S = 120.0
ALONE = 3
"""Requests that are sent one after the other, before those that are sent at once."""

CHAT = "Why is the sky blue? Answer in two sentences."
STORY = "The old lighthouse keeper opened the door and"
FABLE = (
    "A crow had found a piece of cheese and flew with it to a branch of a tall tree to eat it in peace. A "
    "fox who passed below smelled the cheese and wished to have it. He sat down under the tree and "
    "praised the crow: how black and shining her feathers were, how proud her beak, how keen her eyes. "
    "Surely, he said, a bird who looks so fine must have a voice to match, and he had walked many miles "
    "in the hope of hearing her sing just once. The crow had never been told such a thing. She lifted her "
    "head, opened her beak as wide as she could, and gave one loud croak. The cheese fell to the ground, "
    "and the fox caught it before it had stopped rolling. He ate it slowly while the crow looked on. Then "
    "he thanked her, wiped his mouth, and said that he had one piece of advice to give in return for so "
    "good a meal: that she should not trust those who praise her when they stand to gain by it. The crow "
    "sat on her branch until the evening and thought about this, and from that day on, it is said, she "
    "ate her cheese before she listened to anybody. "
)
QUESTION = FABLE + "What did the fox want, and how did he get it?"
QUESTIONS = (
    "Name three rivers in Europe.",
    "What is 12 times 12?",
    "Write a haiku about autumn.",
    "Explain what a battery does.",
    "Translate 'good morning' into French.",
    "Which planet is the largest?",
    "Give me a recipe for pancakes.",
    "What is the capital of Japan?",
)


@dataclass(frozen=True, slots=True)
class Timing:
    """One request as its client saw it. Times in seconds."""

    what: str
    request_id: str
    text: str
    tokens: int
    ttft_s: float
    total_s: float

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.total_s - self.ttft_s) / max(1, self.tokens - 1)


def demo(
    model: Annotated[str, typer.Argument(help="What to serve.")] = "smollm2-135m",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Fetch a small model, serve it, talk to it, show how fast it answers, and stop."""
    with clear_errors():
        from rich.console import Console

        from headrace.cli.models import PullProgress
        from headrace.store import resolve

        console = Console()
        with PullProgress() as progress:
            name = resolve(model, progress).name
        with private_server(
            model,
            lambda line: console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True),
            *("--prefill", "1", "--decode", "1", "--prompt-length-threshold", "128"),
        ) as url:
            timings, batch_s = asyncio.run(_talk(url, name, max_tokens, console))
            routes = [_route(url, one.request_id) for one in timings]
        _show(timings, batch_s, routes, console)


async def _talk(url: str, model: str, max_tokens: int, console: Console) -> tuple[list[Timing], float]:
    """All requests of the demo; also how long the concurrent ones took together."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S) as client:
        console.print(f"\n[bold]A streamed chat:[/] {CHAT}")
        chat = await _timed("chat, streamed", _chat(client, model, CHAT, max_tokens), console)
        console.print(f"\n[bold]A completion:[/] {STORY}", end="")
        story = await _timed("completion, streamed", _completion(client, model, STORY, max_tokens), console)
        console.print(f"\n[bold]A question about a long text:[/] {QUESTION[-48:]}")
        asked = await _timed("chat, long prompt", _chat(client, model, QUESTION, max_tokens), console)
        console.print(f"\n[bold]{len(QUESTIONS)} chats at once[/]")
        began_s = time.perf_counter()
        answers = await asyncio.gather(
            *(_timed(question, _chat(client, model, question, max_tokens)) for question in QUESTIONS)
        )
        batch_s = time.perf_counter() - began_s
    for answer in answers:
        console.print(f"[dim]{answer.what}[/]\n  {' '.join(answer.text.split())}", highlight=False)
    return [chat, story, asked, *answers], batch_s


async def _timed(
    what: str, pieces: AsyncIterator[tuple[str, str, int | None]], console: Console | None = None
) -> Timing:
    """Read an answer to its end, printing it as it comes where there is a console."""
    began_s = time.perf_counter()
    ttft_s = total_s = 0.0
    text, tokens, request_id = "", 0, ""
    async for of_request, piece, counted in pieces:
        request_id = of_request
        tokens = counted or tokens
        if not piece:
            continue
        total_s = time.perf_counter() - began_s
        ttft_s = ttft_s or total_s
        text += piece
        if console is not None:
            console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    if console is not None:
        console.print()
    if not text:
        raise ValueError(f"{what}: the server answered with no text")
    return Timing(what, request_id, text, tokens, ttft_s, total_s)


async def _chat(
    client: AsyncOpenAI, model: str, question: str, max_tokens: int
) -> AsyncIterator[tuple[str, str, int | None]]:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        yield chunk.id, text or "", chunk.usage.completion_tokens if chunk.usage else None


async def _completion(
    client: AsyncOpenAI, model: str, prompt: str, max_tokens: int
) -> AsyncIterator[tuple[str, str, int | None]]:
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        yield (
            chunk.id,
            chunk.choices[0].text if chunk.choices else "",
            chunk.usage.completion_tokens if chunk.usage else None,
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request went."""

    prefill: str
    decode: str
    moved_bytes: int
    behind_s: float | None
    """How long after the first token the last of its KV blocks had come; None where none travelled."""

    @property
    def words(self) -> str:
        if self.behind_s is None:
            return f"{self.decode}"
        moved = (
            f"{self.moved_bytes / 2**20:.1f} MiB, there {self.behind_s * 1e3:.0f} ms after the first token"
        )
        return f"{self.prefill} → {self.decode}: {moved}"


def _route(url: str, request_id: str) -> Route:
    """What the server tells of one request's way."""
    (journey,) = ask(url, f"/cluster/requests/{request_id}")["requests"]
    events = {event["what"]: event for event in journey["events"]}
    decode = events["placed"]["worker"]
    moved = events.get("blocks transferred")
    if moved is None:
        return Route(decode, decode, 0, None)
    behind_s = max(0.0, moved["at_s"] - events["first token"]["at_s"])
    return Route(events["prefill placed"]["worker"], decode, moved["detail"]["bytes"], behind_s)


def _show(timings: list[Timing], batch_s: float, routes: list[Route], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("REQUEST")
    for heading in ("TOKENS", "TTFT ms", "TPOT ms", "TOKENS/S"):
        table.add_column(heading, justify="right")
    table.add_column("WHERE, AND WHAT IT MOVED")

    def row(what: str, tokens: int, ttft_s: float, tpot_s: float, rate: float, where: str) -> None:
        table.add_row(what, f"{tokens}", f"{ttft_s * 1e3:.0f}", f"{tpot_s * 1e3:.1f}", f"{rate:.0f}", where)

    alone, together = timings[:ALONE], timings[ALONE:]
    for one, route in zip(alone, routes, strict=False):
        row(one.what, one.tokens, one.ttft_s, one.tpot_s, one.tokens / one.total_s, route.words)
    tokens = sum(one.tokens for one in together)
    row(
        f"{len(together)} chats at once (means)",
        tokens,
        sum(one.ttft_s for one in together) / len(together),
        sum(one.tpot_s for one in together) / len(together),
        tokens / batch_s,
        ", ".join(sorted({route.words for route in routes[ALONE:]})),
    )
    console.print()
    console.print(table)
