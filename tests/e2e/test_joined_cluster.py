"""A cluster put together by hand: a gateway, and workers that join it over mutual TLS, each a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import Served

HEADRACE = [sys.executable, "-m", "headrace"]
PROMPT = "Once upon a time there was a river that ran through a green valley. " * 30
SMALL = ("--kv-cache-memory", "128MiB", "--threads", "1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    return tmp_path


@contextmanager
def joined(model: Path, address: str, role: str) -> Iterator[subprocess.Popen[str]]:
    options = ("--role", role, "--name", role, "--join", address, *SMALL)
    process = subprocess.Popen([*HEADRACE, "worker", str(model), *options], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


def free_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def ask(url: str, prompt: str) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def command(*arguments: str) -> str:
    done = subprocess.run([*HEADRACE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def wait_workers(url: str, number: int) -> None:
    deadline = time.monotonic() + 30
    while sum(w["state"] == "up" for w in httpx.get(f"{url}/cluster").json()["workers"]) < number:
        assert time.monotonic() < deadline, httpx.get(f"{url}/cluster").text
        time.sleep(0.1)


def test_a_cluster_by_hand_outlives_its_gateway(smollm2_dir: Path, home: Path) -> None:
    address = free_address()
    gateway = Served(smollm2_dir, "--listen", address, command="gateway")
    with joined(smollm2_dir, address, "prefill"), joined(smollm2_dir, address, "decode"):
        with gateway:
            assert (home / "cluster" / "ca.pem").exists()
            wait_workers(gateway.url, 2)
            first = ask(gateway.url, PROMPT)
            way = command("explain", first["id"], "--url", gateway.url)
            assert "prefill placed [prefill]" in way
            assert "blocks transferred [decode]" in way
            status = json.loads(command("status", "--url", gateway.url, "--json"))
            assert {w["id"]: w["role"] for w in status["workers"]} == {
                "prefill": "prefill",
                "decode": "decode",
            }
            assert "decode" in command("status", "--url", gateway.url)
            gateway.process.kill()
            gateway.process.wait()
        with Served(smollm2_dir, "--listen", address, command="gateway") as again:
            wait_workers(again.url, 2)
            second = ask(again.url, "Now: " + PROMPT)
            assert second["choices"][0]["text"]
            assert ask(again.url, PROMPT)["choices"][0]["text"] == first["choices"][0]["text"]
            assert "drains" in command("drain", "decode", "--url", again.url)
            deadline = time.monotonic() + 20
            while httpx.get(f"{again.url}/ready").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_a_worker_of_another_cluster_or_model_is_told_why(smollm2_dir: Path, home: Path) -> None:
    address = free_address()
    with Served(smollm2_dir, "--listen", address, "--kv-cache-memory", "128MiB") as served:
        wait_workers(served.url, 1)
        unfit = ("--name", "unfit", "--join", address, "--max-model-len", "64", *SMALL)
        done = subprocess.run(
            [*HEADRACE, "worker", str(smollm2_dir), *unfit], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "its max model len is 64, and that of engine is" in done.stderr
        assert os.listdir(home / "cluster")
        assert ask(served.url, "Hello")["usage"]["completion_tokens"] == 8
