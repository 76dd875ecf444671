"""The pause that a handoff puts between the first and the second token, seen by the client of real workers.

Two servers of one prefill and one decode worker, one after the other, get the same prompts: one prefills in
chunks, whose blocks are pulled while the next is computed, so that at the end those of the last remain; the
other prefills in one step, after which everything is pulled. The pause is the second token's time minus the
first's, less an ordinary step between two later tokens; the whole transfer's time is what the second server
reports of its pulls. Ends with exit code 1 when the pause is above 1 / chunks + 5% of the whole transfer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.table import Table

PROMPT_TOKENS = 4096
OUTPUT_TOKENS = 12
LARGEST_TOKEN = 49_000
ALLOWANCE = 0.05


@dataclass(frozen=True)
class Stream:
    """One request, times in seconds."""

    gap_s: float
    """From the first token to the second."""
    step_s: float
    """The median between two later tokens."""
    move_s: float
    """From the first block's coming to the confirmation, as the target's worker reports it."""

    @property
    def pause_s(self) -> float:
        return self.gap_s - self.step_s


def ask(client: httpx.Client, prompt: list[int]) -> Stream:
    body = {
        "model": "smollm2-135m",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times: list[float] = []
    name = ""
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                name = json.loads(line.removeprefix("data: "))["id"]
    steps = [after - before for before, after in itertools.pairwise(times[1:])]
    (journey,) = client.get(f"/cluster/requests/{name}").raise_for_status().json()["requests"]
    moves = [one["detail"]["move_s"] for one in journey["events"] if one["what"] == "blocks transferred"]
    if len(moves) != 1:
        raise SystemExit(f"the prompt was not handed over: {journey['events']}")
    return Stream(times[1] - times[0], statistics.median(steps), moves[0])


def measure(batched_tokens: int, prompts: list[list[int]]) -> list[Stream]:
    """What each prompt met at a server that computes so many tokens in a step; the first one warms up."""
    command = [sys.executable, "-m", "headrace", "serve", "smollm2-135m", "--port", "0"]
    command += ["--prefill", "1", "--decode", "1", "--max-num-batched-tokens", str(batched_tokens)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if line.startswith("ready"):
                break
        else:
            raise SystemExit("the server did not start")
        url = line.strip().rpartition(" ")[2].removesuffix("/v1")
        with httpx.Client(base_url=url, timeout=120) as client:
            return [ask(client, prompt) for prompt in prompts][1:]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.communicate(timeout=60)
        finally:
            server.kill()
            server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    chance = random.Random(1)
    prompts = [
        [chance.randrange(100, LARGEST_TOKEN) for _ in range(PROMPT_TOKENS)]
        for _ in range(arguments.repeats + 1)
    ]
    chunked = measure(PROMPT_TOKENS // arguments.chunks, prompts)
    whole = measure(PROMPT_TOKENS, prompts)
    transfer_s = statistics.median(one.move_s for one in whole)
    table = Table("prefill", "first to second token, ms", "later step, ms", "pause, ms", "of the transfer")
    for name, streams in ((f"{arguments.chunks} chunks", chunked), ("in one go", whole)):
        columns = [
            statistics.median(values)
            for values in zip(*((s.gap_s, s.step_s, s.pause_s) for s in streams), strict=True)
        ]
        table.add_row(name, *(f"{1e3 * value:.1f}" for value in columns), f"{columns[-1] / transfer_s:.1%}")
    Console().print(table)
    limit = 1 / arguments.chunks + ALLOWANCE
    pause_s = statistics.median(one.pause_s for one in chunked)
    print(f"the whole transfer takes {1e3 * transfer_s:.1f} ms; the pause may be {limit:.1%} of it")
    return 0 if pause_s <= limit * transfer_s else 1


if __name__ == "__main__":
    sys.exit(main())
