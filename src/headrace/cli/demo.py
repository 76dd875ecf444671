"""`headrace demo`: a small model, a real server, and the official client talking to it.

What a stranger would do in the first five minutes, timed: a streamed chat, a completion, and eight requests
at once. The server is the one that `headrace serve` starts, in a process of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.errors import clear_errors
from headrace.cli.private_server import private_server

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from rich.console import Console

REQUEST_TIMEOUT_S = 120.0

CHAT = "Why is the sky blue? Answer in two sentences."
STORY = "The old lighthouse keeper opened the door and"
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
        ) as url:
            timings, batch_s = asyncio.run(_talk(url, name, max_tokens, console))
        _show(timings, batch_s, console)


async def _talk(url: str, model: str, max_tokens: int, console: Console) -> tuple[list[Timing], float]:
    """All requests of the demo; also how long the concurrent ones took together."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S) as client:
        console.print(f"\n[bold]A streamed chat:[/] {CHAT}")
        chat = await _timed("chat, streamed", _chat(client, model, CHAT, max_tokens), console)
        console.print(f"\n[bold]A completion:[/] {STORY}", end="")
        story = await _timed("completion, streamed", _completion(client, model, STORY, max_tokens), console)
        console.print(f"\n[bold]{len(QUESTIONS)} chats at once[/]")
        began_s = time.perf_counter()
        answers = await asyncio.gather(
            *(_timed(question, _chat(client, model, question, max_tokens)) for question in QUESTIONS)
        )
        batch_s = time.perf_counter() - began_s
    for answer in answers:
        console.print(f"[dim]{answer.what}[/]\n  {' '.join(answer.text.split())}", highlight=False)
    return [chat, story, *answers], batch_s


async def _timed(
    what: str, pieces: AsyncIterator[tuple[str, int | None]], console: Console | None = None
) -> Timing:
    """Read an answer to its end, printing it as it comes where there is a console."""
    began_s = time.perf_counter()
    ttft_s = total_s = 0.0
    text, tokens = "", 0
    async for piece, counted in pieces:
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
    return Timing(what, text, tokens, ttft_s, total_s)


async def _chat(
    client: AsyncOpenAI, model: str, question: str, max_tokens: int
) -> AsyncIterator[tuple[str, int | None]]:
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
        yield text or "", chunk.usage.completion_tokens if chunk.usage else None


async def _completion(
    client: AsyncOpenAI, model: str, prompt: str, max_tokens: int
) -> AsyncIterator[tuple[str, int | None]]:
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
            chunk.choices[0].text if chunk.choices else "",
            chunk.usage.completion_tokens if chunk.usage else None,
        )


def _show(timings: list[Timing], batch_s: float, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("REQUEST")
    for heading in ("TOKENS", "TTFT ms", "TPOT ms", "TOKENS/S"):
        table.add_column(heading, justify="right")

    def row(what: str, tokens: int, ttft_s: float, tpot_s: float, rate: float) -> None:
        table.add_row(what, f"{tokens}", f"{ttft_s * 1e3:.0f}", f"{tpot_s * 1e3:.1f}", f"{rate:.0f}")

    for one in timings[:2]:
        row(one.what, one.tokens, one.ttft_s, one.tpot_s, one.tokens / one.total_s)
    together = timings[2:]
    tokens = sum(one.tokens for one in together)
    row(
        f"{len(together)} chats at once (means)",
        tokens,
        sum(one.ttft_s for one in together) / len(together),
        sum(one.tpot_s for one in together) / len(together),
        tokens / batch_s,
    )
    console.print()
    console.print(table)
