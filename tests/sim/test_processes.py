"""Work shared out to processes: in order, whatever they take, and gone with whoever asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from headrace.sim.processes import in_processes

SEARCH = [sys.executable, "-m", "headrace", "simulate", "--seeds", "0:100000", "--jobs", "2"]


def slower_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def end_at_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number


def test_results_come_in_order() -> None:
    assert list(in_processes(slower_first, range(7), 3)) == [0, 1, 4, 9, 16, 25, 36]
    assert list(in_processes(slower_first, [5], 4)) == [25]
    assert list(in_processes(slower_first, [], 4)) == []


def test_a_process_that_ends_early_is_no_wait_for_ever() -> None:
    with pytest.raises(ChildProcessError, match="ended with 9"):
        list(in_processes(end_at_three, range(10), 2))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, ""),
        (signal.SIGINT, 128 + signal.SIGINT, "headrace: interrupted\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_they_end_with_the_search_and_without_a_word(number: signal.Signals, code: int, says: str) -> None:
    search = subprocess.Popen(
        SEARCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 20.0
        workers: list[psutil.Process] = []
        while len(workers) < 2 or any(worker.cpu_times().user < 0.3 for worker in workers):
            assert time.monotonic() < deadline, "no two processes work"
            time.sleep(0.05)
            children = psutil.Process(search.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        children = psutil.Process(search.pid).children()
        search.send_signal(number)
        _, said = search.communicate(timeout=10)  # to the end of all that could write into it
    finally:
        search.kill()
        search.wait()
    assert search.returncode == code
    assert [line for line in said.splitlines(keepends=True) if "histories" not in line] == says.splitlines(
        True
    )
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
