"""Many requests at the highest rate the server holds, some of them cut off and some malformed: does it hold?

A ramp of closed-loop concurrency finds the rate. Then, at that concurrency: no 5xx, exactly one ending for
each sequence as clients and as the gateway count them, memory flat, all KV blocks back. Ends with exit code 1
when one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvloop
from rich.console import Console
from rich.table import Table

from headrace.bench.http import HttpClient, Origin
from serving import Samples, Server, samples, value
from soak_workload import Ask, Workload, send

RAMP = (8, 16, 32, 64, 128)
GAIN = 1.03
"""The ramp ends at the first level that is not faster than the best before by this factor."""
QUIET_TIMEOUT_S = 30.0
SAMPLE_S = 0.5
LEVEL_SHARE = 0.02
"""Requests of one level of the ramp, of all; at least two for each place."""
MAX_GROWTH_MB = 16.0
"""By how much a process may grow from the run's second fifth to its last: allocators breathe."""


@dataclass
class Result:
    """What became of the requests, and of the processes meanwhile."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    seconds: float = 0.0
    rss: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By process: (share of the requests done, bytes resident)."""

    def count(self, ask: Ask, wrong: str | None) -> None:
        kind = (
            "malformed"
            if ask.status != 200
            else "cut off"
            if ask.cut
            else "streamed"
            if ask.stream
            else "whole"
        )
        self.kinds[kind] += 1
        if wrong is not None:
            self.wrong[f"{kind}: {wrong}"] += 1


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    held: bool


async def run(
    client: HttpClient, concurrency: int, requests: int, next_ask: Callable[[], Ask], result: Result
) -> float:
    """Send `requests` with so many under way at all times; returns requests per second."""
    began = time.monotonic()
    left = requests

    async def place() -> None:
        nonlocal left
        while left:
            left -= 1
            ask = next_ask()
            result.sent += 1
            result.count(ask, await send(client, ask))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(place())
    result.seconds = time.monotonic() - began
    return requests / result.seconds


async def find_concurrency(
    client: HttpClient, requests: int, levels: Sequence[int]
) -> tuple[int, dict[int, float], Result]:
    """The concurrency of the ramp with the highest rate; the rates; what went wrong on the way."""
    workload, rates, result = Workload(1), {}, Result()
    for concurrency in levels:
        level = max(2 * concurrency, int(LEVEL_SHARE * requests))
        rates[concurrency] = await run(
            client, concurrency, level, lambda: workload.next(undisturbed=True), result
        )
        before = [rate for other, rate in rates.items() if other != concurrency]
        if before and rates[concurrency] < GAIN * max(before):
            break
    return max(rates, key=lambda level: rates[level]), rates, result


async def watch(server: Server, result: Result, requests: int) -> None:
    """Sample memory and show progress until cancelled."""
    told = time.monotonic()
    every_s = 1.0 if sys.stderr.isatty() else 20.0
    end = "\r" if sys.stderr.isatty() else "\n"
    while True:
        done = sum(result.kinds.values())
        for name, process in server.processes.items():
            result.rss.setdefault(name, []).append((done / requests, process.memory_info().rss))
        if (now := time.monotonic()) - told >= every_s:
            told = now
            memory = ", ".join(f"{name} {sizes[-1][1] / 1e6:.0f} MB" for name, sizes in result.rss.items())
            wrong = sum(result.wrong.values())
            print(
                f"{done}/{requests} requests, {wrong} wrong, {memory}    ",
                end=end,
                file=sys.stderr,
                flush=True,
            )
        await asyncio.sleep(SAMPLE_S)


async def page_when_quiet(client: HttpClient) -> Samples:
    """The metrics when nothing runs or waits any more, or after a while as they are."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        page = samples((await client.get("/metrics")).body.decode())
        busy = value(page, "num_requests_running") + value(page, "num_requests_waiting")
        if not busy and accepted(page) == ended(page):
            return page
        if time.monotonic() > deadline:
            return page
        await asyncio.sleep(0.1)


def accepted(page: Samples) -> int:
    """Sequences that the gateway accepted."""
    return int(value(page, "request_params_n_sum"))


def ended(page: Samples) -> int:
    """Endings that it counted."""
    return int(sum(count for (name, _), count in page.items() if name == "request_success_total"))


def growth_mb(sizes: list[tuple[float, int]]) -> float:
    """From the second fifth of the run to its last: medians, in MB."""
    parts = [
        [size for share, size in sizes if begin <= share <= begin + 0.2] or [sizes[-1][1]]
        for begin in (0.2, 0.8)
    ]
    return (statistics.median(parts[1]) - statistics.median(parts[0])) / 1e6


def verdict(result: Result, before: Samples, after: Samples) -> list[Check]:
    """What must hold, and whether it does."""
    wrong = sum(result.wrong.values())
    answers = sum(result.kinds.values())
    errors = value(after, "request_success_total", finished_reason="error") - value(
        before, "request_success_total", finished_reason="error"
    )
    new, over = accepted(after) - accepted(before), ended(after) - ended(before)
    held_blocks = value(after, "kv_cache_usage_perc")
    open_sequences = value(after, "num_requests_running") + value(after, "num_requests_waiting")
    restarts = value(after, "engine_starts_total") - value(before, "engine_starts_total")
    return [
        Check(
            "every answer as it must be, none 5xx",
            f"{answers - wrong} of {result.sent}",
            answers == result.sent and not wrong,
        ),
        Check("one ending for each sequence", f"{over} endings of {new} sequences", new == over > 0),
        Check("no sequence ended in an error", f"{errors:.0f}", not errors),
        Check("nothing runs or waits", f"{open_sequences:.0f}", not open_sequences),
        Check("all KV blocks back", f"{held_blocks:.1%} held", not held_blocks),
        Check("the engine never ended", f"{restarts:.0f} restarts", not restarts),
        *(
            Check(f"memory flat: {name}", f"{growth_mb(sizes):+.1f} MB", growth_mb(sizes) <= MAX_GROWTH_MB)
            for name, sizes in result.rss.items()
        ),
    ]


async def soak(server: Server, requests: int, seed: int, levels: Sequence[int]) -> int:
    client = HttpClient(Origin.parse(server.url))
    concurrency, rates, warm_up = await find_concurrency(client, requests, levels)
    before = await page_when_quiet(client)
    result = Result()
    watcher = asyncio.create_task(watch(server, result, requests))
    workload = Workload(seed)
    rate = await run(client, concurrency, requests, workload.next, result)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    after = await page_when_quiet(client)
    client.close()

    result.wrong += warm_up.wrong
    ramp = ", ".join(f"{level}: {rate:.0f}/s" for level, rate in rates.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    tokens = value(after, "generation_tokens_total") - value(before, "generation_tokens_total")
    print(f"ramp, requests under way: {ramp}")
    print(
        f"{requests} requests, {concurrency} under way, {rate:.1f}/s, "
        f"{tokens / result.seconds:.0f} tokens/s: {kinds}"
    )
    for wrong, count in result.wrong.most_common(10):
        print(f"wrong, {count} times: {wrong}")
    table = Table()
    for column in ("what must hold", "found", ""):
        table.add_column(column)
    checks = verdict(result, before, after)
    for check in checks:
        table.add_row(check.name, check.found, "held" if check.held else "NOT HELD")
    Console().print(table)
    return 0 if all(check.held for check in checks) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=RAMP, help="levels of the ramp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of headrace serve, after --")
    arguments = parser.parse_args()
    # A small KV cache, so that all of it has been touched before memory is compared.
    options = ["--kv-cache-memory", "128MiB", *arguments.options]
    with Server(arguments.model, options) as server:
        code = uvloop.run(soak(server, arguments.requests, arguments.seed, arguments.concurrency))
    sys.exit(code)


if __name__ == "__main__":
    main()
