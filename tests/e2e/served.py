"""`headrace serve` with a real model, as a process of its own, for tests from outside."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class Served:
    """A server from entering to leaving the context; `lines` is what it said."""

    def __init__(self, model: Path, *options: str, command: str = "serve") -> None:
        self.command = [sys.executable, "-m", "headrace", command, str(model), "--port", "0", *options]
        self.lines: list[str] = []
        self._said: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Served:
        self.launch()
        self.wait_line("ready after")
        self.url = self.lines[-1].rpartition(" ")[2].removesuffix("/v1")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5)

    def launch(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._said.put(line.rstrip())
        self._said.put(None)

    def wait_line(self, beginning: str) -> str:
        """Wait until the server has said a line that begins so."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            line = self._said.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"the server ended: {self.lines}"
            self.lines.append(line)
            if line.startswith(beginning):
                return line

    def rest(self) -> list[str]:
        """All that it said after the line that was waited for last, once it has ended."""
        rest: list[str] = []
        while (line := self._said.get(timeout=STOP_TIMEOUT_S)) is not None:
            rest.append(line)
        return rest

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_end(self) -> int:
        """Wait for its end; nothing it started may be left. Returns the exit code."""
        children = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        code = self.process.wait(STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left behind: {alive}"
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            assert self.wait_end() == 0

    @property
    def gateway(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    @property
    def engine(self) -> psutil.Process:
        (worker,) = self.gateway.children()
        (child,) = worker.children()
        return child

    def metrics(self) -> dict[str, float]:
        """Every sample without labels but the model's, by name; endings as "ended:REASON"."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if "finished_reason" in sample.labels:
                    found["ended:" + sample.labels["finished_reason"]] = sample.value
                elif "le" not in sample.labels:
                    found[sample.name.removeprefix("headrace:")] = sample.value
        return found

    def wait_quiet(self) -> dict[str, float]:
        """Wait until nothing runs, waits or is held; returns the metrics then."""
        deadline = time.monotonic() + 10
        while True:
            now = self.metrics()
            if not any(
                now[n] for n in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            ):
                return now
            assert time.monotonic() < deadline, f"not quiet: {now}"
            time.sleep(0.05)
