"""A server's life from outside: loading, signals, an engine that does not start or does not last."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from api_house import EOS, VOCAB_SIZE

from headrace.api.service import Service

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from served import Served

LONG = {"prompt": "a", "max_tokens": 90_000, "ignore_eos": True, "stream": True}


class HashServed(Served):
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, drain_s: float = 20.0, **engine: Any
    ) -> None:
        shape = {
            "max_model_len": 100_000,
            "vocab_size": VOCAB_SIZE,
            "eos_token_ids": [EOS],
            "num_blocks": 30_000,
            "step_s": 0.01,
            **engine,
        }
        monkeypatch.setenv("HASH_ENGINE", json.dumps(shape))
        monkeypatch.setenv("TMPDIR", str(directory))
        super().__init__(directory)
        self.command = [sys.executable, str(Path(__file__).with_name("hash_service.py")), str(drain_s)]


@pytest.fixture
def directory():  # type: ignore[no-untyped-def]
    """Where the server keeps its temporary files; it must leave none, however it is ended."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def left_in(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith("headrace-")]


def test_sigterm_drains_and_exits_0(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    with HashServed(monkeypatch, directory) as server:
        body = {**LONG, "max_tokens": 40}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            server.wait_line("draining: 1 running or waiting, 20 s at most")
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
            assert httpx.get(f"{server.url}/ready").status_code == 503
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert server.wait_end() == 0
    assert not left_in(directory)


def test_a_server_whose_last_worker_is_drained_ends_well(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    with HashServed(monkeypatch, directory) as server:
        assert httpx.post(f"{server.url}/cluster/workers/engine/drain").status_code == 200
        server.wait_line("all workers have left")
        server.wait_line("stopped")
        assert server.wait_end() == 0
    assert not left_in(directory)


def test_a_drain_has_an_end(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    with HashServed(monkeypatch, directory, drain_s=0.3) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as running:
            lines = running.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            rest = "".join(lines)
        assert "the server stopped before the request had ended" in rest
        server.wait_line("some requests had not ended")
        assert server.wait_end() == 0


def test_ctrl_c_does_not_wait_for_requests(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    with HashServed(monkeypatch, directory) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as running:
            lines = running.iter_lines()
            next(lines)
            began = time.monotonic()
            server.signal(signal.SIGINT)
            assert "the server stopped before" in "".join(lines)
        assert server.wait_end() == 0
        assert time.monotonic() - began < 5
    assert not left_in(directory)


def test_a_second_signal_ends_everything_at_once(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    with HashServed(monkeypatch, directory) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as running:
            lines = running.iter_lines()  # closing it would be leaving
            next(lines)
            children = server.gateway.children()
            server.signal(signal.SIGTERM)
            server.wait_line("draining")
            server.signal(signal.SIGTERM)
            assert server.process.wait(5) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    assert not left_in(directory)


def test_while_it_loads_it_answers_for_itself_and_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    server = HashServed(monkeypatch, directory, fail="hang")
    server.launch()
    try:
        server.wait_line("engine: loading a model of hashes")
        (listening,) = [c for c in server.gateway.net_connections() if c.status == psutil.CONN_LISTEN]
        url = f"http://127.0.0.1:{listening.laddr.port}"
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        assert "being loaded" in httpx.post(f"{url}/v1/completions", json=LONG).text
        assert httpx.get(f"{url}/v1/models").status_code == 200
        server.stop()
    finally:
        server.process.kill()
    assert not left_in(directory)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("refuse", "headrace: error: the hashes are broken"),
        ("crash", "headrace: error: the engine did not start"),
    ],
)
def test_an_engine_that_does_not_start_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, directory: Path, fail: str, words: str
) -> None:
    server = HashServed(monkeypatch, directory, fail=fail)
    server.launch()
    server.wait_line(words)
    assert server.process.wait(10) == 1
    assert not left_in(directory)


def test_a_signal_after_the_end_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    codes: list[int] = []
    monkeypatch.setattr("headrace.api.service.os._exit", codes.append)
    service = object.__new__(Service)
    service._say, service._signals, service._stopped = lines.append, [signal.SIGTERM], True
    service._on_signal(signal.SIGTERM)
    assert (lines, codes) == ([], [])
