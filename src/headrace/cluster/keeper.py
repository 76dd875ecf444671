"""Keeps a worker of this machine running: starts its process, and starts it again when it was killed.

A worker restarts its own engine; when it ends by itself, with an exit code, it has given up and says why. One
that stands still is killed on word of who hears it, and started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.world import World
from headrace.world.launcher import Launcher, to_the_end

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
STABLE_AFTER_S = 60.0
"""A worker that ran this long was lost by accident; the pause begins small again."""


class WorkerLostError(Exception):
    """A worker cannot be kept running; the text says how it ended."""


class Keeper:
    """One worker's process."""

    def __init__(
        self, world: World, name: str, launcher: Launcher, report: Callable[[str], None] = lambda line: None
    ) -> None:
        """`report` gets a line whenever the process was lost and is started again."""
        self._world = world
        self.name = name
        self._launcher = launcher
        self._report = report
        self._given_up: asyncio.Future[str] | None = None
        self.began_s = 0.0
        """When the process that runs now was started."""

    def give_up(self, why: str) -> None:
        """Kill the process that runs now, and start another."""
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_result(why)

    async def run(self, address: str) -> None:
        """Keep the worker running, a member of the gateway at `address`, until it ends well.

        Raises WorkerLostError when it gave up. Cancelled, it kills the process first.
        """
        losses = 0
        while True:
            self.began_s = self._world.now()
            process = await self._launcher.launch(address)
            ended = asyncio.create_task(process.wait(), name=f"{self.name} end")
            self._given_up = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait({ended, self._given_up}, return_when=asyncio.FIRST_COMPLETED)
                how = await (ended if ended.done() else self._given_up)
            finally:
                self._given_up = None
                ended.cancel()
                await to_the_end(process.kill())
            if how == "exit code 0":
                return
            if how.startswith("exit code"):
                raise WorkerLostError(f"{self.name} gave up with {how}")
            losses = 1 if self._world.now() - self.began_s >= STABLE_AFTER_S else losses + 1
            pause_s = min(FIRST_PAUSE_S * 2 ** (losses - 1), LONGEST_PAUSE_S)
            self._report(f"{self.name} was lost with {how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
