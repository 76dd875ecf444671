"""`headrace serve` as a child of a benchmark: started, asked, its processes' memory read, stopped."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

STOP_TIMEOUT_S = 60.0


class Server:
    """A server from entering to leaving the context, on any free port. What it says is kept in `lines`."""

    def __init__(self, model: str, options: Sequence[str] = ()) -> None:
        self._command = [sys.executable, "-m", "headrace", "serve", model, "--port", "0", *options]
        self.lines: list[str] = []

    def __enter__(self) -> Server:
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        try:
            assert self._process.stderr is not None
            for line in self._process.stderr:
                self.lines.append(line.rstrip())
                if line.startswith("ready"):
                    break
            else:
                raise SystemExit("the server did not start:\n" + "\n".join(self.lines))
        except BaseException:
            self._process.kill()
            raise
        self.url = self.lines[-1].rpartition(" ")[2].removesuffix("/v1")
        return self

    @functools.cached_property
    def processes(self) -> dict[str, psutil.Process]:
        """Those of a server with one worker."""
        gateway = psutil.Process(self._process.pid)
        (worker,) = gateway.children()
        return {"gateway": gateway, "worker": worker, "engine": worker.children()[0]}

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()

    def metrics(self) -> Samples:
        return samples(httpx.get(f"{self.url}/metrics").text)


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    """A metrics page by name (without the prefix) and labels (without the model's)."""
    return {
        (
            sample.name.removeprefix("headrace:"),
            frozenset((key, value) for key, value in sample.labels.items() if key != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(page: Samples, name: str, **labels: str) -> float:
    return page[name, frozenset(labels.items())]


@dataclass(frozen=True)
class Memory:
    """One process now, in bytes, and the most it had resident since its start or `forget_peak`."""

    pss: int
    rss: int
    peak_rss: int


def memory(process: psutil.Process) -> Memory:
    """Linux only: from /proc."""
    rollup = _kilobytes(f"/proc/{process.pid}/smaps_rollup")
    status = _kilobytes(f"/proc/{process.pid}/status")
    return Memory(rollup["Pss"], rollup["Rss"], status["VmHWM"])


def forget_peak(process: psutil.Process) -> None:
    """Let the peak begin again at what is resident now."""
    with open(f"/proc/{process.pid}/clear_refs", "w") as file:
        file.write("5")


def _kilobytes(path: str) -> dict[str, int]:
    with open(path) as file:
        fields = (line.split() for line in file)
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1] == "kB"}
