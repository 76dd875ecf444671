"""Ctrl-C in the first moments of a command, as modules load and after: exit code 130, one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FIRST_WORD = """
import os, sys
from headrace.cli import interrupts, main
interrupts.take_interrupts()
os.write(1, b"x")
main()
"""
"""The command, which says when its first line has run."""

DELAYS_S = (0.0, 0.05, 0.2, 0.6)
COMMANDS = {
    "demo": ("{model}",),
    "bench": ("--engine", "{model}", "--num-requests", "2"),
    "simulate": ("--seeds", "0:100000", "--jobs", "2"),
    "status": ("--url", "{silent}"),
    "models": ("show", "{model}"),
}


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_with_a_line_whenever_ctrl_c_comes(
    command: str, delay_s: float, smollm2_dir: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = {"model": str(smollm2_dir), "silent": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        options = [option.format(**told) for option in COMMANDS[command]]
        process = subprocess.Popen(
            [sys.executable, "-c", FIRST_WORD, command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "HEADRACE_HOME": str(tmp_path)},
        )
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"x"
            time.sleep(delay_s)
            children = psutil.Process(process.pid).children(recursive=True)
            over = process.poll() is not None
            if not over:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, said = process.communicate(timeout=40)
        finally:
            process.kill()
            process.wait()
    assert b"Traceback" not in said, said.decode()
    assert b"Exception ignored" not in said, said.decode()
    if over or (command == "models" and process.returncode == 0):
        assert (process.returncode, said) == (0, b"")  # it had done all
    else:
        assert (process.returncode, said.splitlines()[-1:]) == (130, [b"headrace: interrupted"]), (
            said.decode()
        )
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    """As for what a shell script starts in the background."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from headrace.cli.interrupts import interruptible, take_interrupts\n"
        "take_interrupts()\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "with interruptible():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print('on')\n"
    )
    assert subprocess.check_output([sys.executable, "-c", program]) == b"on\n"
