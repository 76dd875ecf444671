"""A gateway, the workers that it starts on this machine, and a door for others.

Its own workers meet it at a unix socket in a directory that only this user can enter. However the gateway's
process ends, they end with it; a directory that a killed gateway left is removed by the next one. Workers of
elsewhere dial in at an address of the network, and stay when the gateway goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from headrace.cluster.gateway import Gateway
from headrace.cluster.keeper import Keeper
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.protocol.messages import EngineInfo
from headrace.world import World
from headrace.world.launcher import Launcher
from headrace.world.private_directory import PrivateDirectory

LEAVE_TIMEOUT_S = 5.0
"""How long dismissed workers may take to end before they are killed."""


class LocalCluster:
    """Workers behind one gateway, from `start` to `stop`."""

    def __init__(
        self,
        world: World,
        launchers: Mapping[str, Launcher],
        *,
        listen: str | None = None,
        observer: GatewayObserver | None = None,
        options: GatewayOptions | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`launchers`, by the names of the workers, start each worker's process. At `listen` others join."""
        self._options = options or GatewayOptions()
        self._listen = listen
        self.gateway = Gateway(world, observer, self._options, report)
        self._keepers = [Keeper(world, name, launcher, report) for name, launcher in launchers.items()]
        self._report = report
        self._started = False
        self._running: asyncio.Task[None] | None = None
        self._directory: PrivateDirectory | None = None

    async def start(self) -> EngineInfo:
        """Start the workers and wait until all of them serve; without any, until one joins that decodes.

        Raises StartFailedError when one says that it cannot, WorkerLostError when it ends without a word,
        OSError where nobody can listen.
        """
        if self._listen is not None:
            self._report(f"workers may join at {await self.gateway.listen(self._listen)}")
        self._directory = PrivateDirectory("headrace-")
        address = await self.gateway.listen(f"unix:{self._directory.path}/gateway.sock", own=True)
        self._running = asyncio.create_task(self._keep(address), name="local cluster")
        ready = asyncio.create_task(self.gateway.wait_ready(max(1, len(self._keepers))), name="local start")
        try:
            await asyncio.wait({self._running, ready}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done() and self.gateway.start_failure is None:
                await self._running  # raises why
            info = await ready
            self._started = True
            return info
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def _keep(self, address: str) -> None:
        """Run all keepers. Before all workers served, and of the last one, a failure is raised."""
        if not self._keepers:
            await asyncio.get_running_loop().create_future()  # others keep their workers
        keepers = {asyncio.create_task(keeper.run(address)): keeper.name for keeper in self._keepers}
        running = set(keepers)
        watch = asyncio.create_task(self._watch(), name="local watch")
        try:
            while running:
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for keeper in ended:
                    if (error := keeper.exception()) is not None:
                        if not self._started or not self._can_serve(keepers[each] for each in running):
                            raise error
                        self._report(str(error))
        finally:
            for task in (watch, *keepers):
                task.cancel()
            await asyncio.gather(watch, *keepers, return_exceptions=True)

    async def _watch(self) -> None:
        """Have those workers started again that were given up for their silence and do not come back.

        Their processes live and do nothing. They get as long to come back as they got to speak, in turns of
        this loop: after a stillness of our own they are not to blame.
        """
        every_s, limit_s = self._options.heartbeat_s, self._options.lapse_s
        turns = dict.fromkeys(self._keepers, 0)
        while True:
            await asyncio.sleep(every_s)
            for keeper in self._keepers:
                turns[keeper] = turns[keeper] + 1 if self._fell_silent(keeper) else 0
                if turns[keeper] * every_s > limit_s:
                    keeper.give_up(f"a process that stood still for {2 * limit_s:g} s")

    def _fell_silent(self, keeper: Keeper) -> bool:
        """Whether its present process was a member, was given up for its silence, and is none again."""
        member = self.gateway.registry.get(keeper.name)
        if member is None or member.is_live or member.down_s < keeper.began_s:
            return False
        return member.down_s - member.heard_s > self._options.lapse_s

    def _can_serve(self, workers: Iterable[str]) -> bool:
        """Whether one of these decodes, or others may join."""
        members = [self.gateway.registry.get(name) for name in workers]
        decodes = any(member is None or member.info.role.decodes for member in members)
        return decodes or self._listen is not None

    async def wait_given_up(self) -> None:
        """Wait until a worker cannot be kept running; raises why. Returns when all were dismissed."""
        if self._running is None:
            raise RuntimeError("the workers were not started")
        await asyncio.shield(self._running)

    async def stop(self, drain_s: float = 0.0) -> bool:
        """Drain for at most `drain_s` (see `Gateway.drain`), end the workers and the socket. Idempotent."""
        served = bool(self._keepers) and any(True for _ in self.gateway.registry.live())
        own = [keeper.name for keeper in self._keepers]
        finished = await self.gateway.drain(drain_s, dismiss=own)
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=LEAVE_TIMEOUT_S if served else 0.0)
            self._running.cancel()  # kills a worker that loads, or does not leave
            await asyncio.gather(self._running, return_exceptions=True)
        self.discard()
        return finished

    def discard(self) -> None:
        """Remove the socket and no more, for a process that is about to end itself."""
        if self._directory is not None:
            self._directory.remove()
            self._directory = None
