"""How an engine's process ends: at once when all is done, with what went wrong on standard error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, runpy, sys
atexit.register(print, "finalised")
sys.argv = ["engine", "unix:/nowhere", sys.argv[1]]
if wrong := "{wrong}":
    import headrace.world.launcher
    headrace.world.launcher.die_with_parent = lambda pid: eval(wrong)
print("begun")
runpy.run_module("headrace.worker.main", run_name="__main__")
"""


@pytest.mark.parametrize(("wrong", "says"), [("", b"DecodeError"), ("1 / 0", b"ZeroDivisionError")])
def test_it_is_not_finalised(wrong: str, says: bytes) -> None:
    """With torch loaded that takes seconds, in which whoever stops the worker waits."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(wrong=wrong), str(os.getpid())], input=b"", capture_output=True
    )
    assert ended.returncode == 1
    assert ended.stdout == b"begun\n"
    assert ended.stderr.startswith(b"Traceback")
    assert says in ended.stderr
