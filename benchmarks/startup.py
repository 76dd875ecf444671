"""From the exec of `headrace serve` to the first token of a streamed request, with the model cached.

Medians over repetitions of the whole; then where the time goes, phase by phase, each in a fresh process, and
the imports that cost most. Ends with exit code 1 when the median is above the limit.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

import httpx
from rich.console import Console
from rich.table import Table

from serving import Server

LIMIT_S = 5.0

_ENGINE_PHASES = """
import json, sys, time
began = time.perf_counter()
import headrace.worker.main
worker_s = time.perf_counter() - began
import torch
torch_s = time.perf_counter() - began - worker_s
import headrace.execution.build as build
rest_s = time.perf_counter() - began - worker_s - torch_s
from headrace.config import EngineOptions
from headrace.store import resolve
directory = str(resolve(sys.argv[1]).directory)
began = time.perf_counter()
build.build_engine(EngineOptions(directory=directory, served_name="model"))
print(json.dumps([worker_s, torch_s, rest_s, time.perf_counter() - began]))
"""
_IMPORTED = re.compile(r"import time:\s+\d+ \|\s+(\d+) \| (\s*)(\S+)")


def once(model: str, options: list[str]) -> tuple[float, float]:
    """Seconds from exec to "ready", and to the first token."""
    with Server(model, options) as server:
        ready_s = time.monotonic() - server.started_s
        body = {"prompt": "Once upon a time", "max_tokens": 4, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            answer.raise_for_status()
            next(answer.iter_lines())
            return ready_s, time.monotonic() - server.started_s


def engine_phases(model: str) -> list[float]:
    """Seconds: the engine's imports without torch, torch, the rest that needs torch, and building."""
    found: list[float] = json.loads(
        subprocess.run(
            [sys.executable, "-c", _ENGINE_PHASES, model], check=True, capture_output=True, text=True
        ).stdout
    )
    return found


def costly_imports(module: str, most: int = 8) -> list[tuple[str, float]]:
    """The packages with the largest share of importing `module`, and their seconds with all they import."""
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    costs: dict[str, float] = {}
    for microseconds, _, name in _IMPORTED.findall(said):
        if "." not in name or name.startswith("headrace."):
            costs[name] = int(microseconds) / 1e6
    return sorted(costs.items(), key=lambda item: -item[1])[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--imports", action="store_true", help="also list the costliest imports")
    parser.add_argument("options", nargs="*", help="options of headrace serve, after --")
    arguments = parser.parse_args()

    runs = [once(arguments.model, arguments.options) for _ in range(arguments.repeat)]
    phases = [engine_phases(arguments.model) for _ in range(3)]
    table = Table(title=f"{arguments.model}: seconds, median")
    table.add_column("what")
    table.add_column("s", justify="right")
    rows = zip(
        ("imports without torch", "torch", "imports with torch", "loading and packing weights"),
        zip(*phases, strict=True),
        strict=True,
    )
    for what, times in rows:
        table.add_row(f"engine: {what}", f"{statistics.median(times):.2f}")
    table.add_section()
    table.add_row("exec to ready", f"{statistics.median(ready for ready, _ in runs):.2f}")
    first_s = statistics.median(first for _, first in runs)
    table.add_row("exec to first token", f"{first_s:.2f}")
    Console().print(table)
    if arguments.imports:
        for module in ("headrace.cli.serve", "headrace.api.service", "headrace.worker.main", "torch"):
            print(f"{module}: " + ", ".join(f"{name} {s:.2f}" for name, s in costly_imports(module)))
    held = first_s <= arguments.limit_s
    print(f"start to first token: {first_s:.2f} s, limit {arguments.limit_s:g} s: ", end="")
    print("held" if held else "NOT HELD")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
