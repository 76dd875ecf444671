"""`headrace top` from outside: one frame as text, and a real terminal that it leaves as it was."""

from __future__ import annotations

import contextlib
import http.server
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app

RECORDED = Path(__file__).parents[1] / "observe" / "recorded"
DEADLINE_S = 60.0
LEAVES_SCREEN = b"\x1b[?1049l"
SHOWS_CURSOR = b"\x1b[?25h"


@contextmanager
def server(key: str = "") -> Iterator[str]:
    """The address of a server that answers with what was recorded; with a key, only to who sends it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, name = 200, {"/cluster": "cluster_2.json", "/metrics": "metrics_2.txt"}[self.path]
            body = (RECORDED / name).read_bytes()
            if key and self.path == "/cluster" and self.headers["Authorization"] != f"Bearer {key}":
                status, body = 401, b'{"error": {"message": "give a key"}}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            listening.shutdown()
            thread.join()


def once(url: str, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["top", "--once", "--url", url, *options])
    return done.exit_code, done.output


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.cli.top.ONCE_S", 0.01)
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)


def test_one_frame_is_plain_text() -> None:
    with server() as url:
        code, said = once(url)
    assert code == 0, said
    assert said.splitlines()[0].strip() == f"smollm2-135m at {url}  ready, 3 of 3 workers up"
    assert "decode-2" in said and "since the start" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("said", "options", "width"), [("", (), 160), ("125", (), 125), ("125", ("--width", "80"), 80)]
)
def test_a_frame_in_a_pipe_is_as_wide_as_columns_or_the_option_says(
    monkeypatch: pytest.MonkeyPatch, said: str, options: tuple[str, ...], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", said)
    with server() as url:
        code, shown = once(url, *options)
    assert code == 0, shown
    assert max(map(len, shown.splitlines())) <= width
    assert (("LEASED" in shown), ("Latency, since" in shown)) == (width >= 120, width >= 140)


def test_a_key_is_sent() -> None:
    with server("secret") as url:
        assert once(url) == (1, "headrace: error: give a key\n")
        assert once(url, "--api-key", "secret")[0] == 0


def test_no_server_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, said = once(url)
    assert code == 1
    assert said.startswith(f"headrace: error: no server answers at {url}")
    code, said = once("127.0.0.1:8000")
    assert code == 1
    assert "--url 127.0.0.1:8000 is no address of HTTP; give http://HOST:PORT" in said


def test_without_a_terminal_it_says_what_to_do() -> None:
    done = CliRunner().invoke(app, ["top"])
    assert done.exit_code == 1
    assert "--once prints one frame as text" in done.output


@pytest.mark.parametrize("how", ["q", "ctrl-c", "SIGTERM"])
def test_the_terminal_is_left_as_it_was(how: str) -> None:
    """From a server that is away to one that answers, and out."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "headrace", "top", "--interval", "0.1", "--url"]
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        away = f"http://127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [*command, away],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(terminal)
    try:
        said = read_until(controller, b"Asking again")
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            os.write(controller, b"q" if how == "q" else b"\x03")
        said += read_until(controller, None)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert LEAVES_SCREEN in said and SHOWS_CURSOR in said
    assert b"Traceback" not in said


def read_until(controller: int, mark: bytes | None) -> bytes:
    """What comes up to `mark`, or up to the end."""
    said, deadline = b"", time.monotonic() + DEADLINE_S
    while mark is None or mark not in said:
        left = deadline - time.monotonic()
        assert left > 0, said[-2000:]
        if not select.select([controller], [], [], left)[0]:
            continue
        try:
            more = os.read(controller, 65536)
        except OSError:  # the other side was closed
            more = b""
        if not more:
            assert mark is None, said[-2000:]
            break
        said += more
    return said
