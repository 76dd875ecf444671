"""SIGTERM and SIGINT in the first moments of a command that serves: it ends at once, and leaves nothing.

Whenever the signal comes, as modules load, as the model is found, as engines start, or as they serve: exit
code 0, `stopped` as the last line, no traceback, no process, no socket, no directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DELAYS_S = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0)
"""Since the start of the process."""
CATCHES_WITHIN_S = 10.0
ENDS_WITHIN_S = 10.0
SMALL = ("--kv-cache-memory", "64MiB", "--threads", "1")
COMMANDS = {
    "serve": ("--port", "0", "--prefill", "1", "--decode", "1", *SMALL),
    "gateway": ("--port", "0", "--listen", "127.0.0.1:0"),
    "worker": ("--join", "127.0.0.1:9", *SMALL),  # where nobody listens
}


def wait_caught(process: subprocess.Popen[str]) -> None:
    """Wait until the process has a handler for both: what comes before is the interpreter's own start."""
    deadline = time.monotonic() + CATCHES_WITHIN_S
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        caught = int(line.split()[1], 16)
        if all(caught >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT)):
            return
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "it does not take signals"
        time.sleep(0.002)


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_well_whenever_the_signal_comes(
    command: str, delay_s: float, smollm2_dir: Path, tmp_path: Path
) -> None:
    later = DELAYS_S.index(delay_s) + list(COMMANDS).index(command)
    number = (signal.SIGTERM, signal.SIGINT)[later % 2]
    scratch, home = tmp_path / "tmp", tmp_path / "home"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", command, str(smollm2_dir), *COMMANDS[command]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch), "HEADRACE_HOME": str(home)},
    )
    children: list[psutil.Process] = []
    try:
        time.sleep(delay_s)
        wait_caught(process)
        children = psutil.Process(process.pid).children(recursive=True)
        began_s = time.monotonic()
        process.send_signal(number)
        printed, said = process.communicate(timeout=ENDS_WITHIN_S)
        took_s = time.monotonic() - began_s
    finally:
        process.kill()
        process.wait()
    lines = said.splitlines()
    assert process.returncode == 0, (number, took_s, said)
    assert lines.count("stopped") == 1, said
    assert lines[-1] == "stopped"
    assert "Traceback" not in said
    assert not printed
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"left behind: {alive}"
    assert not list(scratch.iterdir())
    assert not home.exists() or [path.name for path in home.iterdir()] in ([], ["cluster"])
