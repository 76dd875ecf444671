"""The pause that a handoff puts between the first and the second token, seen by the client of real workers.

Two clusters of one prefill and one decode worker, one after the other, get the same prompts: one prefills in
chunks, whose blocks are pulled while the next is computed, so that at the end those of the last remain; the
other prefills in one step, after which everything is pulled. The pause is the second token's time minus the
first's, less an ordinary step between two later tokens; the whole transfer's time is what the second cluster
reports of its pulls. Ends with exit code 1 when the pause is above 1 / chunks + 5% of the whole transfer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests" / "faults"))
from link import Link

PORT = 7000
START_TIMEOUT_S = 60.0
SETTLE_S = 3.0
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


class Cluster:
    """A gateway with one prefill and one decode worker of one thread each, from entering to leaving."""

    def __init__(self, batched_tokens: int, link: Link | None, directory: Path) -> None:
        """Workers compute so many tokens in a step. With a `link`, the prefill worker is at its far end."""
        self._tokens = str(batched_tokens)
        self._link = link
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = ""

    def __enter__(self) -> Cluster:
        near, far = (self._link.near_host, self._link.far_host) if self._link else ("127.0.0.1",) * 2
        inside = self._link.inside if self._link else ()
        gateway = f"{near}:{PORT}"
        self._launch("gateway", "--listen", gateway, "--port", "0")
        self._until(lambda: (self._directory / "credentials" / "node.pem").exists())
        for role, host, at in (("decode", near, ()), ("prefill", far, inside)):
            options = ("--join", gateway, "--role", role, "--name", role, "--data-address", f"{host}:0")
            self._launch(
                "worker", *options, "--threads", "1", "--max-num-batched-tokens", self._tokens, at=at
            )
        self._until(lambda: "ready after" in self._said())
        self.url = self._said().rpartition(": ")[2].strip().removesuffix("/v1")
        self._until(lambda: len(self._up()) == 2)
        time.sleep(SETTLE_S)  # while the pages of both pools are taken
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(timeout=30)
            finally:
                process.kill()

    def _launch(self, command: str, *options: str, at: tuple[str, ...] = ()) -> None:
        headrace = (*at, sys.executable, "-m", "headrace", command, "smollm2-135m", *options)
        with open(self._directory / f"{command}.log", "w") as log:
            credentials = ("--credentials", str(self._directory / "credentials"))
            self._processes.append(
                subprocess.Popen([*headrace, *credentials], stdout=log, stderr=subprocess.STDOUT)
            )

    def _said(self) -> str:
        return (self._directory / "gateway.log").read_text()

    def _up(self) -> list[str]:
        workers = httpx.get(f"{self.url}/cluster", timeout=10).raise_for_status().json()["workers"]
        return [worker["id"] for worker in workers if worker["state"] == "up"]

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline or any(one.poll() is not None for one in self._processes):
                logs = [log.read_text()[-1000:] for log in self._directory.glob("*.log")]
                raise SystemExit("the cluster did not start:\n" + "\n".join(logs))
            time.sleep(0.1)


def measure(batched_tokens: int, prompts: list[list[int]], link: Link | None) -> list[Stream]:
    """What each prompt met at workers that compute so many tokens in a step; the first one warms up."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(batched_tokens, link, Path(directory)) as cluster,
        httpx.Client(base_url=cluster.url, timeout=120) as client,
    ):
        return [ask(client, prompt) for prompt in prompts][1:]


@contextlib.contextmanager
def link_of(megabits: float | None) -> Iterator[Link | None]:
    if megabits is None:
        yield None
        return
    with Link() as link:
        link.slow(megabits)
        yield link


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--link",
        type=float,
        metavar="MBIT/S",
        help="put the prefill worker behind a link of this speed (Linux, root)",
    )
    arguments = parser.parse_args()
    chance = random.Random(1)
    prompts = [
        [chance.randrange(100, LARGEST_TOKEN) for _ in range(PROMPT_TOKENS)]
        for _ in range(arguments.repeats + 1)
    ]
    with link_of(arguments.link) as link:
        chunked = measure(PROMPT_TOKENS // arguments.chunks, prompts, link)
        whole = measure(PROMPT_TOKENS, prompts, link)
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
