"""Peak memory of all processes over weights and KV pool, while the server starts and under load.

The pool is small enough for the load to write all of it, so that nothing is taken off that was not resident;
while the server starts, nothing of the pool is. Peaks are resident sets, in which what the processes share
counts twice. Ends with exit code 1 when the peak is above the limit.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
from rich.console import Console
from rich.table import Table

from serving import Memory, Server, forget_peak, memory, value

LIMIT_MB = 600
BATCH = 32
LONG_PROMPT = 4096


def ask(url: str, prompt_tokens: int, output_tokens: int, seed: int) -> None:
    generator = random.Random(seed)
    prompt = [generator.randrange(1000, 40_000) for _ in range(prompt_tokens)]
    body = {"prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()


def load(url: str) -> None:
    """32 sequences at once, twice over, with one of 4,096 tokens in between and one beside the second 32."""
    with ThreadPoolExecutor(BATCH + 1) as threads:
        for turn in range(2):
            asked = [threads.submit(ask, url, 64, 64, 100 * turn + i) for i in range(BATCH)]
            if turn:
                asked.append(threads.submit(ask, url, LONG_PROMPT, 4, 1000))
            for each in asked:
                each.result()
            if not turn:
                ask(url, LONG_PROMPT, 4, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv-cache-memory", default="128MiB")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    parser.add_argument("options", nargs="*", help="further options of headrace serve, after --")
    arguments = parser.parse_args()

    peaks: dict[str, dict[str, Memory]] = {}
    with Server(
        arguments.model, ["--kv-cache-memory", arguments.kv_cache_memory, *arguments.options]
    ) as server:
        peaks["start"] = {name: memory(process) for name, process in server.processes.items()}
        for process in server.processes.values():
            forget_peak(process)
        load(server.url)
        peaks["load"] = {name: memory(process) for name, process in server.processes.items()}
        page = server.metrics()
    if not value(page, "kv_cache_evictions_total"):
        raise SystemExit(
            "no cached block was evicted, so not all of the pool is written; lower --kv-cache-memory"
        )
    weights, pool = value(page, "model_weight_bytes"), value(page, "kv_cache_bytes")

    table = Table(title=f"{arguments.model}: resident memory in MB")
    for column in ("phase", "process", "PSS after", "RSS after", "peak"):
        table.add_column(column, justify="left" if column in ("phase", "process") else "right")
    over = {}
    for phase, processes in peaks.items():
        taken_off = weights + (pool if phase == "load" else 0)
        for name, now in processes.items():
            table.add_row(phase, name, mb(now.pss), mb(now.rss), mb(now.peak_rss))
        total = sum(now.peak_rss for now in processes.values())
        over[phase] = total - taken_off
        table.add_row("", "all", "", "", mb(total))
        table.add_row("", "weights and pool", "", "", mb(-taken_off))
        table.add_row("", "over them", "", "", mb(over[phase]), end_section=True)
    Console().print(table)
    worst = max(over.values()) / 1e6
    held = worst <= arguments.limit_mb
    print(f"peak over weights and KV pool: {worst:.0f} MB, limit {arguments.limit_mb:.0f} MB: ", end="")
    print("held" if held else "NOT HELD")
    sys.exit(0 if held else 1)


def mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


if __name__ == "__main__":
    main()
