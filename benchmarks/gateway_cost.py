"""Microseconds of CPU that the gateway's process takes for a request, and for each token that it streams.

The server is `modelled_server.py`: real processes and sockets, chat completions streamed over HTTP, the
model's own tokenizer and template; only the workers' executors compute nothing. What counts is the CPU time,
user and system, of the gateway's process alone, as the kernel accounts for it.

Of a request: reading HTTP, validating the body, the chat template, admission, naming the prompt's blocks by
hashes, routing by the KV index, the message to the worker, the KV events that come of it, what is kept to be
explained, metrics, the answer's head, its first and its last chunk. Of a token: its share of the worker's
message for each step, the ledger, metrics, detokenising, the event and its write to the client's socket.
Tokenising is apart: it is the tokenizers library's, measured in the same process, and subtracted.

Requests come at random, at a rate that keeps some 20 to 30 sequences at each worker: answers of 128 tokens
all the time, and among them, in some workloads, answers of 8. Prompts are of a few or of 1,000 tokens, a
quarter of which are a system prompt that all share; in the last workload they are more than the workers can
compute, so most wait at the gateway for their turn. Over the workloads of one round,

    CPU - tokenising  =  requests with few tokens · a  +  requests with 1,000 · b  +  tokens · c

is solved by least squares. Other work on the machine shares caches with this one and can only add to these:
of several rounds, each workload's least counts. The spread is that of rounds solved one by one, in which what
is too little for one cost is too much for another.

Where the gateway is late, tokens of two steps become one event, which is cheaper than it should be. So events
are counted as tokens, and a workload with more than MOST_JOINED tokens to an event does not count.

The expectation is at most 700 µs for a request of 1,000 tokens and 40 µs for a token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pydoc_data.topics
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from headrace.bench.http import HttpClient, Origin, Receiver
from headrace.store import resolve
from headrace.text import Tokenizer

MODEL = "smollm2-135m"
WANTED_REQUEST_US, WANTED_TOKEN_US = 700.0, 40.0
SYSTEM_TOKENS, FEW_TOKENS = 250, 8
MOST_JOINED = 1.15
SETTLE_S = 0.3
"""After a workload: what it left to do counts as its."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike but for their text."""

    rate: float
    """A second, in the mean."""
    long: bool
    """Whether prompts are of 1,000 tokens."""
    answer: int
    """Tokens of each answer."""


WORKLOADS = (
    (Kind(50, False, 128),),
    (Kind(50, True, 128),),
    (Kind(25, False, 128), Kind(150, False, 8)),
    (Kind(25, False, 128), Kind(120, True, 8)),
)
"""What is asked at the same time, for WORKLOAD_S seconds each."""
WORKLOAD_S = 4.0


@dataclass(frozen=True, slots=True)
class Asked:
    """How much a workload came to."""

    short: int
    long: int
    """Requests by their prompts."""
    tokens: int
    """Of all answers."""
    events: int
    """That brought them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one round came to, in microseconds of CPU."""

    short: float
    long: float
    token: float


class Gateway:
    """A modelled server from entering to leaving the context."""

    def __init__(self, directory: Path, workers: int) -> None:
        script = Path(__file__).with_name("modelled_server.py")
        self._command = [sys.executable, str(script), str(directory), "--workers", str(workers)]

    def __enter__(self) -> Gateway:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        self.url = self._line("ready").rpartition(" ")[2].removesuffix("/v1")
        self.pid = self._process.pid
        self._cpu = psutil.Process(self.pid)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=60)
        finally:
            self._process.kill()
            self._process.wait()

    def _line(self, beginning: str) -> str:
        said = []
        for line in self._process.stderr or ():
            said.append(line)
            if line.startswith(beginning):
                return line.rstrip()
        raise SystemExit(f"the server ended; it said:\n{''.join(said)}")

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of CPU so far, and those of them that went into tokenising."""
        used = self._cpu.cpu_times()
        os.kill(self.pid, signal.SIGUSR1)
        return used.user + used.system, float(self._line("tokenised").split()[1])


class Chunks(Receiver):
    """Counts the events of an answer."""

    def __init__(self) -> None:
        self.status = self.events = 0
        self.tail = b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def piece(self, data: bytes, at: float) -> None:
        self.events += data.count(b"data: ")
        self.tail = data

    @property
    def content(self) -> int:
        """Events with tokens: all but the role's and [DONE]."""
        return self.events - 2


class Clients:
    """Ask one server, each on a connection of its own, whether or not others were answered."""

    def __init__(self, url: str, tokenizer: Tokenizer) -> None:
        self._http = HttpClient(Origin.parse(url))
        self._random = random.Random(5)
        self._tokenizer = tokenizer
        self._corpus = tokenizer.encode("".join(pydoc_data.topics.topics.values())[:2_000_000], False)
        self._system = self._text(SYSTEM_TOKENS)

    def _text(self, tokens: int) -> str:
        at = self._random.randrange(len(self._corpus) - tokens)
        return self._tokenizer.decode(self._corpus[at : at + tokens])

    def _body(self, kind: Kind) -> bytes:
        user = {"role": "user", "content": self._text(1000 - SYSTEM_TOKENS if kind.long else FEW_TOKENS)}
        system = [{"role": "system", "content": self._system}] if kind.long else []
        return msgspec.json.encode(
            {
                "model": MODEL,
                "messages": [*system, user],
                "max_tokens": kind.answer,
                "temperature": 0.7,
                "stream": True,
            }
        )

    async def play(self, kinds: Sequence[Kind]) -> Asked:
        """Send a workload and read all answers."""
        due = sorted(
            (self._random.uniform(0, WORKLOAD_S), self._body(kind), kind)
            for kind in kinds
            for _ in range(round(kind.rate * WORKLOAD_S))
        )
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with asyncio.TaskGroup() as group:
            answers = []
            for at_s, body, _ in due:
                await asyncio.sleep(began_s + at_s - loop.time())
                answers.append(group.create_task(self._ask(body)))
        long = sum(kind.long for *_, kind in due)
        tokens = sum(kind.answer for *_, kind in due)
        return Asked(len(due) - long, long, tokens, sum(answer.result() for answer in answers))

    async def _ask(self, body: bytes) -> int:
        answer = Chunks()
        await self._http.post("/v1/chat/completions", body, answer)
        if answer.status != 200 or not answer.tail.endswith(b"data: [DONE]\n\n"):
            raise SystemExit(f"an answer failed with {answer.status}: {answer.tail[:300]!r}")
        return answer.content

    def close(self) -> None:
        self._http.close()


@dataclass(frozen=True, slots=True)
class Played:
    """What one workload took."""

    asked: Asked
    cpu_s: float
    tokenising_s: float

    @property
    def counts(self) -> bool:
        """Whether tokens came one by one."""
        return self.asked.tokens <= MOST_JOINED * self.asked.events


async def play(gateway: Gateway, clients: Clients, kinds: Sequence[Kind]) -> Played:
    before_s, tokenised_s = gateway.cpu_s()
    asked = await clients.play(kinds)
    await asyncio.sleep(SETTLE_S)
    after_s, tokenised_after_s = gateway.cpu_s()
    return Played(asked, after_s - before_s, tokenised_after_s - tokenised_s)


def fit(played: list[Played]) -> Cost:
    """The three costs that explain a round best."""
    counts = [[one.asked.short, one.asked.long, one.asked.events] for one in played]
    cpu_us = [1e6 * (one.cpu_s - one.tokenising_s) for one in played]
    found, *_ = np.linalg.lstsq(np.array(counts, float), np.array(cpu_us), rcond=None)
    short, long, token = map(float, found)
    return Cost(short, long, token)


async def flame(gateway: Gateway, clients: Clients, file: Path, seconds: int) -> None:
    """Sample the gateway's stack while all workloads run in turn."""
    kind = "flamegraph" if file.suffix == ".svg" else "raw"
    command = ["py-spy", "record", "--pid", str(gateway.pid), "--rate", "400", "--format", kind]
    command += ["--duration", str(seconds), "--output", str(file)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    spy = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, "PATH": path}, stdout=asyncio.subprocess.DEVNULL
    )
    while spy.returncode is None:
        for kinds in WORKLOADS:
            if spy.returncode is None:
                await clients.play(kinds)
    if await spy.wait():
        raise SystemExit("py-spy could not sample the gateway: it needs the right to trace processes")


def least(played: list[Played]) -> list[Played]:
    """Of each workload the round that took least. Raises SystemExit where none counts."""
    found = []
    for at in range(len(WORKLOADS)):
        counted = [one for one in played[at :: len(WORKLOADS)] if one.counts]
        if not counted:
            raise SystemExit(
                "the gateway was late in every round: measure with less other work on the machine"
            )
        found.append(min(counted, key=lambda one: one.cpu_s - one.tokenising_s))
    return found


def table(rounds: list[Cost], best: Cost) -> Table:
    made = Table("µs of CPU", "least", "rounds, from", "median", "to", "at most")
    for label, wanted, name in (
        ("a request with a few tokens", None, "short"),
        ("a request with 1,000", WANTED_REQUEST_US, "long"),
        ("a token", WANTED_TOKEN_US, "token"),
    ):
        values = [getattr(one, name) for one in rounds]
        cells = (getattr(best, name), min(values), statistics.median(values), max(values))
        made.add_row(label, *(f"{cell:.1f}" for cell in cells), "" if wanted is None else f"{wanted:g}")
    return made


async def measure(asked: argparse.Namespace, console: Console) -> int:
    files = resolve(MODEL)
    tokenizer = Tokenizer.from_file(
        files.tokenizer, bos_token_id=files.bos_token_id, eos_token_ids=files.eos_token_ids
    )
    with Gateway(files.directory, asked.workers) as gateway:
        clients = Clients(gateway.url, tokenizer)
        for kinds in WORKLOADS:
            await clients.play(kinds)  # what is made on first use is made
        rounds: list[Cost] = []
        played: list[Played] = []
        for number in range(asked.rounds):
            played += (these := [await play(gateway, clients, kinds) for kinds in WORKLOADS])
            rounds.append(cost := fit(these))
            console.print(
                f"round {number + 1}: {cost.short:.0f}, {cost.long:.0f}, {cost.token:.1f} µs from "
                + ", ".join(f"{one.cpu_s:.2f}{'' if one.counts else ' (late)'}" for one in these)
                + " s of CPU"
            )
        if asked.flame is not None:
            await flame(gateway, clients, asked.flame, asked.seconds)
        clients.close()
    best = fit(least(played))
    console.print(table(rounds, best))
    tokenising_s = sum(one.tokenising_s for one in played) / sum(one.asked.long for one in played)
    console.print(f"tokenising, apart: {1e6 * tokenising_s:.0f} µs for a prompt of 1,000 tokens")
    met = best.long <= WANTED_REQUEST_US and best.token <= WANTED_TOKEN_US
    console.print("met" if met else "MISSED")
    return 0 if met else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of all workloads (5)")
    parser.add_argument("--workers", type=int, default=2, help="that answer (2)")
    parser.add_argument("--flame", type=Path, help="write a flame graph here, SVG (or the raw stacks, .txt)")
    parser.add_argument("--seconds", type=int, default=30, help="that the flame graph is of (30)")
    return asyncio.run(measure(parser.parse_args(), Console(width=160)))


if __name__ == "__main__":
    sys.exit(main())
