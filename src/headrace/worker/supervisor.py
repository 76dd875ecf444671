"""A worker's supervisor: it keeps an engine running, is a member of the cluster for it, and moves its blocks.

It runs in a process of its own and never computes, so that it answers at once while a step runs.

    launch ─▶ engine ready ─▶ member of each gateway ─▶ engine lost, failed or stuck ─▶ leave, pause, launch
       │
       └▶ the engine says that it cannot start, or ends by itself before it serves: the end

One life of an engine has one generation number, one pool of blocks, and one membership in each cluster. With
the engine all of these end: gateways replay what it had, and tickets for its blocks are void.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from headrace.protocol.channel import Channel
from headrace.protocol.messages import FromGateway, StartFailed
from headrace.worker.life import CannotStartError, EngineLife
from headrace.worker.options import WorkerOptions
from headrace.worker.session import CONNECT_TIMEOUT_S
from headrace.world import ConnectFailed, World
from headrace.world.launcher import Launcher

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
STABLE_AFTER_S = 60.0
"""An engine that served this long is lost by accident; the pause begins small again."""
MAX_RESTARTS = 8
"""Losses in quick succession after which the supervisor gives up."""

TELL_TIMEOUT_S = 2.0
"""How long a gateway may take to read why a worker will not come."""


class EngineLostError(Exception):
    """The engine cannot be kept running; the text says how it ended."""


class Supervisor:
    """One worker."""

    def __init__(
        self,
        world: World,
        options: WorkerOptions,
        launcher: Launcher,
        engine_address: str,
        *,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`engine_address` is where the engine dials in; `report` gets lines for people."""
        self._world = world
        self._options = options
        self._launcher = launcher
        self._engine_address = engine_address
        self._report = report
        self._life: EngineLife | None = None
        self._draining = False

    @property
    def life(self) -> EngineLife | None:
        """The engine that runs now."""
        return self._life

    @property
    def serves(self) -> bool:
        """Whether an engine stands."""
        return self._life is not None and self._life.is_ready

    def drain(self) -> None:
        """Take nothing new; `run` returns when what was accepted is over. Idempotent."""
        self._draining = True
        if self._life is not None:
            self._life.drain()

    async def run(self) -> None:
        """Keep an engine running until it is drained.

        Raises CannotStartError or EngineLostError when that cannot be; gateways are told. RejectedError.
        """
        losses = 0
        served = False
        while True:
            life = self._life = EngineLife(
                self._world, self._options, self._launcher, self._engine_address, self._report
            )
            if self._draining:
                return
            try:
                how = await life.run()
            except CannotStartError as error:
                await self._tell_failed(str(error))
                raise
            finally:
                self._life = None
            if how is None:
                return
            served = served or life.served_s is not None
            if not served and not how.startswith("SIG"):  # nobody killed it: it would end so again
                await self._tell_failed(f"the engine did not start: {how}")
                raise EngineLostError(f"the engine did not start: {how}")
            losses = 1 if life.served_s is not None and life.served_s >= STABLE_AFTER_S else losses + 1
            if losses > MAX_RESTARTS:
                raise EngineLostError(f"the engine was lost {losses} times in a row, at last with {how}")
            pause_s = min(FIRST_PAUSE_S * 2 ** (losses - 1), LONGEST_PAUSE_S)
            self._report(f"the engine was lost with {how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)

    async def _tell_failed(self, message: str) -> None:
        """Let gateways know why this worker will not come."""
        for address in self._options.join:
            try:
                connection = await self._world.network.connect(address, timeout_s=CONNECT_TIMEOUT_S)
            except ConnectFailed:
                continue
            channel: Channel[FromGateway] = Channel(connection, receives=FromGateway)
            channel.post(StartFailed(message))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_TIMEOUT_S):
                    await channel.close()
