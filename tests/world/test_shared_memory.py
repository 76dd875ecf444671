"""Memory of two processes: both see it, either may be killed, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.world.shared_memory import SharedMemory, SharedMemoryError, open_shared_memory

SIZE = 3 * 4096 + 17

OWNER = f"""
import sys
import threading
import time
from headrace.world.shared_memory import SharedMemory
memory = SharedMemory({SIZE})
memory.buffer[-5:] = b"owner"
print(memory.path, flush=True)
sys.stdin.readline()
print(bytes(memory.buffer[:5]).decode(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_processes_see_the_same_bytes(owner: subprocess.Popen[str]) -> None:
    memory = open_shared_memory(read_line(owner), SIZE)
    assert memory.nbytes == SIZE and bytes(memory.buffer[-5:]) == b"owner"
    assert not any(memory.buffer[:-5])
    memory.buffer[:5] = b"other"
    assert owner.stdin is not None
    owner.stdin.write("\n")
    owner.stdin.flush()
    assert read_line(owner) == "other"
    memory.close()


def test_memory_outlives_a_killed_owner_where_it_is_open_and_nowhere_else(
    owner: subprocess.Popen[str],
) -> None:
    path = read_line(owner)
    memory = open_shared_memory(path, SIZE)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert bytes(memory.buffer[-5:]) == b"owner"
    memory.buffer[:] = bytes(SIZE)
    memory.close()
    with pytest.raises(SharedMemoryError, match="process that made it may have ended"):
        open_shared_memory(path, SIZE)


def test_what_is_not_that_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    memory = SharedMemory(SIZE)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = open_files()
    for path, size in (
        (str(tmp_path / "file"), SIZE),
        (str(fifo), SIZE),
        (memory.path, SIZE + 1),
        (memory.path, SIZE - 1),
    ):
        with pytest.raises(SharedMemoryError, match="not shared memory of"):
            open_shared_memory(path, size)
    assert open_files() == before
    memory.close()
    with pytest.raises(SharedMemoryError, match="cannot open"):
        open_shared_memory(memory.path, SIZE)


def test_nobody_can_change_its_size_and_only_its_user_can_open_it() -> None:
    memory = SharedMemory(SIZE)
    for size in (0, SIZE + 1):
        with pytest.raises(PermissionError):
            os.truncate(memory.path, size)
    found = os.stat(memory.path)
    assert (found.st_mode & 0o777, found.st_uid, found.st_size) == (0o600, os.getuid(), SIZE)
    memory.close()


def test_children_do_not_inherit_it() -> None:
    memory = SharedMemory(SIZE)
    command = ["ls", "-l", "/proc/self/fd"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, close_fds=False, check=True).stdout
    assert "pipe:" in said and "memfd:" not in said
    memory.close()


def test_closing_gives_back_all_when_the_last_view_goes() -> None:
    before = open_files()
    memory = SharedMemory(SIZE)
    view = memory.buffer[:10]
    memory.close()
    memory.close()
    assert memory.nbytes == 0
    view[:] = b"0123456789"  # still there
    assert open_files() > before
    del view
    assert open_files() == before
    SharedMemory(SIZE)  # dropped without being closed
    assert open_files() == before


def test_a_system_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        SharedMemory(0)
    with pytest.raises(SharedMemoryError, match=f"cannot map {1 << 62} bytes"):
        SharedMemory(1 << 62)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SharedMemoryError, match="needs memfd_create"):
        SharedMemory(SIZE)


def resident_kb() -> int:
    """Pages of shared memory that this process has at hand."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem"):
            return int(line.split()[1])
    raise AssertionError("the system does not say how much shared memory is resident")


def test_pages_are_there_before_they_are_touched() -> None:
    before, size = resident_kb(), 40 << 20
    memory = SharedMemory(size)
    deadline = time.monotonic() + 20
    while resident_kb() - before < size >> 10:
        assert time.monotonic() < deadline, "pages are missing"
        time.sleep(0.01)
    memory.close()


def test_memory_can_be_closed_while_its_pages_are_taken() -> None:
    files, threads = open_files(), threading.active_count()
    for _ in range(20):
        SharedMemory(64 << 20).close()
    assert (open_files(), threading.active_count()) == (files, threads)
