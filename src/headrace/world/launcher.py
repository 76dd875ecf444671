"""How a process is started, watched and ended: the one place that knows the operating system's processes.

In: a command. Out: a handle that can be waited for and killed, and the lines the process prints. A started
process never outlives the one that started it. It must not know what the process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

KILL_TIMEOUT_S = 10.0
"""How long the kernel may take to end a killed process: one that waits for a disk ends late."""

_PR_SET_PDEATHSIG = 1
_LINE_LIMIT_BYTES = 64 * 1024


class Process(ABC):
    """A process that was started."""

    @abstractmethod
    async def wait(self) -> str:
        """Wait for its end; returns how it ended, in words: "exit code 1", "SIGKILL"."""

    @abstractmethod
    async def kill(self) -> None:
        """End it at once and wait until it is gone. Idempotent."""


class Launcher(ABC):
    """Starts one kind of process."""

    @abstractmethod
    async def launch(self, address: str) -> Process:
        """Start a process that dials in at `address`. Raises OSError."""


class LocalLauncher(Launcher):
    """Starts processes of this machine.

    The command gets the address and this process's id as its last two arguments, `stdin` on its standard
    input, and its output, line by line, goes to `on_line`. It has a session of its own, so Ctrl-C in a
    terminal reaches only the process that started it, which ends it in its own time.
    """

    def __init__(self, command: Sequence[str], stdin: bytes, on_line: Callable[[str], None]) -> None:
        self._command = tuple(command)
        self._stdin = stdin
        self._on_line = on_line

    async def launch(self, address: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            address,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_LINE_LIMIT_BYTES,
        )
        return _LocalProcess(process, self._stdin, self._on_line)


class _LocalProcess(Process):
    def __init__(
        self, process: asyncio.subprocess.Process, stdin: bytes, on_line: Callable[[str], None]
    ) -> None:
        self._process = process
        self._talk = asyncio.gather(self._feed(stdin), self._forward(on_line))

    async def wait(self) -> str:
        await asyncio.shield(self._talk)  # its last words come before its end
        return _ending(await self._process.wait())

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await self.wait()

    async def _feed(self, stdin: bytes) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the process was started without a pipe to its input")
        with contextlib.suppress(ConnectionError):  # it ended before it read everything; `wait` tells
            self._process.stdin.write(stdin)
            await self._process.stdin.drain()
        self._process.stdin.close()

    async def _forward(self, on_line: Callable[[str], None]) -> None:
        if self._process.stdout is None:
            raise RuntimeError("the process was started without a pipe from its output")
        while True:
            try:
                line = await self._process.stdout.readuntil()
            except asyncio.IncompleteReadError as end:
                if end.partial:
                    on_line(end.partial.decode(errors="replace"))
                return
            except asyncio.LimitOverrunError as long:
                line = await self._process.stdout.read(long.consumed)
            on_line(line.decode(errors="replace").rstrip())


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends.

    To be called first thing by the started process. Linux only; elsewhere the lost connection must do.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"cannot ask to be killed with the parent process: {os.strerror(error)}")
    if os.getppid() != parent_pid:  # it ended before the kernel knew of the wish
        os._exit(1)


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` even if cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
