"""A gateway with an engine on this machine: the smallest cluster, which `serve` and `generate` start.

The two meet at a unix socket in a directory that only this user can enter. However the gateway's process
ends, the engine ends with it; a directory that a killed gateway left is removed by the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.cluster.gateway import Gateway
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.supervisor import LEAVE_TIMEOUT_S, Supervisor
from headrace.protocol.messages import EngineInfo
from headrace.world import World
from headrace.world.launcher import Launcher
from headrace.world.private_directory import PrivateDirectory


class LocalEngine:
    """One engine behind one gateway, from `start` to `stop`."""

    def __init__(
        self,
        world: World,
        launcher: Launcher,
        *,
        observer: GatewayObserver | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.gateway = Gateway(world, observer)
        self._supervisor = Supervisor(world, self.gateway, launcher, report=report)
        self._running: asyncio.Task[None] | None = None
        self._directory: PrivateDirectory | None = None

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it serves.

        Raises StartFailedError when it says that it cannot, EngineLostError when it ends without a word.
        """
        self._directory = PrivateDirectory("headrace-")
        await self.gateway.listen(f"unix:{self._directory.path}/engine.sock")
        self._running = asyncio.create_task(self._supervisor.run(), name="supervisor")
        ready = asyncio.create_task(self.gateway.wait_ready(), name="local engine")
        try:
            await asyncio.wait({self._running, ready}, return_when=asyncio.FIRST_COMPLETED)
            if self._running.done():
                await self._running  # raises why
            return await ready
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def wait_given_up(self) -> None:
        """Wait until the engine cannot be kept running; raises why. Returns when it was drained."""
        if self._running is None:
            raise RuntimeError("the engine was not started")
        await asyncio.shield(self._running)

    async def stop(self, drain_s: float = 0.0) -> bool:
        """Drain for at most `drain_s`, end the engine, remove the socket; see `Gateway.drain`. Idempotent."""
        served = self.gateway.has_engine
        finished = await self.gateway.drain(drain_s)
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=LEAVE_TIMEOUT_S if served else 0.0)
            self._running.cancel()  # kills an engine that loads, or does not leave
            await asyncio.gather(self._running, return_exceptions=True)
        self.discard()
        return finished

    def discard(self) -> None:
        """Remove the socket and no more, for a process that is about to end itself."""
        if self._directory is not None:
            self._directory.remove()
            self._directory = None
