"""A server of one's own: `headrace serve` as a child on a free port, stopped when its user leaves."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headrace.cli.interrupts import leaving_on
from headrace.world.launcher import die_with_parent

START_TIMEOUT_S = 600.0
"""Long enough to fetch a model."""
STOP_TIMEOUT_S = 30.0
READY = "ready"


class ServerLostError(OSError):
    """The server did not come to be ready; the text is the last that it said."""


@contextmanager
def private_server(model: str, say: Callable[[str], None], *options: str) -> Iterator[str]:
    """Serve `model` with `options` and give its URL; `say` gets what the server says while it starts.

    Raises ServerLostError when it does not become ready, or does not end well. It runs in a session of its
    own, so that Ctrl-C does not reach it; SIGTERM and SIGHUP of its user stop it first, and if its user is
    killed, so is it.
    """
    parent = os.getpid()
    server = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", model, "--port", "0", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent),
    )
    with leaving_on(signal.SIGTERM, signal.SIGHUP):
        try:
            yield _wait_ready(server, say)
            if (code := _stop(server)) != 0:
                raise ServerLostError(f"the server ended with exit code {code}")
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[str]) -> int:
    """Ask the server to end, and kill it if it does not in time; its exit code."""
    with contextlib.suppress(ProcessLookupError):
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def _wait_ready(server: subprocess.Popen[str], say: Callable[[str], None]) -> str:
    said: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in server.stderr or ():  # to the very end, so that the server never waits for a reader
            said.put(line.strip())
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    last = "it said nothing"
    while True:
        try:
            line = said.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ServerLostError(
                f"the server was not ready within {START_TIMEOUT_S:g} s; at last: {last}"
            ) from None
        if line is None:
            raise ServerLostError(f"the server did not start: {last}")
        if line.startswith(READY):
            return line.rpartition(" ")[2]
        if line:
            last = line.removeprefix("headrace: error: ")
            say(line)
