"""Starts programs as coroutines: what a launcher does where there are no processes.

In: a coroutine function that takes the address to dial. Out: `Process`es. It works on any event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.world.launcher import Launcher, Process


class TaskProcess(Process):
    """A running coroutine. How it ends is told as a process's end would be."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task

    async def wait(self) -> str:
        await asyncio.wait({self.task})
        if self.task.cancelled():
            return "SIGKILL"
        return "exit code 0" if self.task.exception() is None else "exit code 1"

    async def kill(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        if not self.task.cancelled():
            self.task.exception()  # how it died was told by `wait`


class TaskLauncher(Launcher):
    """Every launch starts `program(address)`."""

    def __init__(self, program: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self._program = program
        self.processes: list[TaskProcess] = []

    async def launch(self, address: str) -> Process:
        process = TaskProcess(asyncio.create_task(self._program(address), name="program"))
        self.processes.append(process)
        return process
