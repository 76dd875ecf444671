"""Keeps an engine behind a gateway: starts it, starts it again when it ends, and leaves none behind.

An engine that says it cannot start is a wrong configuration and not worth another try, and so is a first one
that ends before it serves. One that served and was lost is started again, after a pause that doubles with
each loss in quick succession.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.cluster.gateway import Gateway, GatewayState
from headrace.world import World
from headrace.world.launcher import Launcher, Process

START_TIMEOUT_S = 600.0
"""How long an engine may take to load its model."""

LEAVE_TIMEOUT_S = 5.0
"""How long an engine without a connection may take to end before it is killed."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
STABLE_AFTER_S = 60.0
"""An engine that served this long is lost by accident; the pause begins small again."""
MAX_RESTARTS = 8
"""Losses in quick succession after which the supervisor gives up."""


class EngineLostError(Exception):
    """The engine cannot be kept running; the text says how it ended."""


class Supervisor:
    """One engine behind one gateway."""

    def __init__(
        self,
        world: World,
        gateway: Gateway,
        launcher: Launcher,
        *,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`report` gets a line whenever an engine was lost or is started again."""
        self._world = world
        self._gateway = gateway
        self._launcher = launcher
        self._report = report

    async def run(self) -> None:
        """Keep an engine running until the gateway drains.

        Raises StartFailedError or EngineLostError when that cannot be. Cancelled, it kills the engine first.
        """
        losses = 0
        served = False
        while True:
            process = await self._launcher.launch(self._gateway.address)
            try:
                served_s, how = await self._watch(process)
            finally:
                await _to_the_end(process.kill())
            if self._gateway.state is GatewayState.DRAINING:
                return
            served = served or served_s is not None
            if not served:
                raise EngineLostError(f"the engine did not start: {how}")
            losses = 1 if served_s is not None and served_s >= STABLE_AFTER_S else losses + 1
            if losses > MAX_RESTARTS:
                raise EngineLostError(f"the engine was lost {losses} times in a row, at last with {how}")
            pause_s = min(FIRST_PAUSE_S * 2 ** (losses - 1), LONGEST_PAUSE_S)
            self._report(f"the engine was lost with {how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)

    async def _watch(self, process: Process) -> tuple[float | None, str]:
        """See one engine from start to end; returns how many seconds it served, if any, and how it ended.

        Raises StartFailedError when the engine says that it cannot start.
        """
        ended = asyncio.create_task(process.wait(), name="supervisor.engine")
        ready = asyncio.create_task(self._gateway.wait_ready(), name="supervisor.ready")
        lost: asyncio.Task[None] | None = None
        try:
            await asyncio.wait({ended, ready}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                return None, (await ended if ended.done() else f"no word within {START_TIMEOUT_S:g} s")
            ready.result()  # raises what the engine said is wrong
            began_s = self._world.now()
            lost = asyncio.create_task(self._gateway.wait_lost(), name="supervisor.lost")
            await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            served_s = self._world.now() - began_s
            await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
            return served_s, (await ended if ended.done() else "a lost connection")
        finally:
            tasks = [task for task in (ended, ready, lost) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` even if cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
