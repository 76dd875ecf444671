"""One life of an engine, from launch to loss, and everything that lives and ends with it.

In: options, and how to launch the engine's process. Out: how the engine was lost. What passes between it and
the gateways meanwhile is `relay.py`'s.

The engine                      | how it ends                              | is killed after
--------------------------------|------------------------------------------|------------------
says that it failed, is drained | by itself, once its connection is closed | `LEAVE_TIMEOUT_S`
loses its connection            | by itself                                | `LEAVE_TIMEOUT_S`
does not answer for too long    | not at all: its step is stuck            | no time
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.engine_messages import (
    EngineFailed,
    EngineReady,
    FromEngine,
    Ping,
    ToEngine,
)
from headrace.protocol.messages import StartFailed, WorkerInfo
from headrace.transfer import Connector, Exports, Pool
from headrace.worker.imports import Imports
from headrace.worker.options import WorkerOptions
from headrace.worker.relay import Relay
from headrace.worker.session import RejectedError, Session
from headrace.world import (
    AgentUnavailable,
    Connection,
    ConnectionLost,
    Listener,
    Memory,
    MemoryAgent,
    World,
)
from headrace.world.launcher import Launcher, Process, to_the_end

START_TIMEOUT_S = 600.0
"""How long an engine may take to load its model."""

LEAVE_TIMEOUT_S = 5.0
"""How long an engine without a connection may take to end before it is killed."""

GOODBYE_TIMEOUT_S = 2.0
"""How long gateways may take to hear the goodbye of a worker whose engine is lost."""

REAP_TIMEOUT_S = 0.2
"""How long gateways may wait for how an engine's process ended, which had lost its connection."""

PING_S = 1.0
"""How often the engine is asked whether it still steps."""


class CannotStartError(Exception):
    """The engine cannot be built as asked; the text is the engine's own."""


class EngineLife:
    """From `run` until it returns."""

    def __init__(
        self,
        world: World,
        options: WorkerOptions,
        launcher: Launcher,
        engine_address: str,
        report: Callable[[str], None],
    ) -> None:
        self._world = world
        self._options = options
        self._launcher = launcher
        self._engine_address = engine_address
        self._report = report
        self._channel: Channel[FromEngine] | None = None
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._how = ""
        self._stuck = False
        self._start_failure: str | None = None
        self._memory: Memory | None = None
        self._agent: MemoryAgent | None = None
        self._ended = False
        self._data: Listener | None = None
        self._relay = Relay(world, self._tell)
        self.served_s: float | None = None
        """How long the engine has served; None for one that never did."""

    @property
    def is_ready(self) -> bool:
        return self._connected.is_set()

    @property
    def agent(self) -> MemoryAgent | None:
        """What reads blocks of other workers and shows ours, if anything does."""
        return self._agent

    def open_legs(self) -> dict[str, int]:
        """What is owed to gateways and other workers, for those who check that nothing is left."""
        return self._relay.open_legs()

    def drain(self) -> None:
        """Take nothing new; `run` returns None when everything is over. Idempotent."""
        self._relay.drain()

    # ---- from launch to loss -------------------------------------------------------------------------

    async def run(self) -> str | None:
        """See one engine through its life; returns how it was lost, or None when it was drained.

        Raises CannotStartError when the engine says that it cannot start, or nobody can listen at the data
        address; RejectedError when no gateway takes it. Cancelled, it ends the engine first.
        """
        await self._listen_for_readers()
        try:
            return await self._run()
        finally:
            if self._data is not None:
                await self._data.close()

    async def _listen_for_readers(self) -> None:
        """Have the data address before anything is loaded."""
        address = self._options.data_address
        if address is None:
            return
        try:
            self._data = await self._world.network.listen(address, self._serve_reader, plain=True)
        except (OSError, ValueError) as error:
            raise CannotStartError(f"--data-address cannot be had: {error}") from error

    async def _serve_reader(self, connection: Connection) -> None:
        if self._relay.exports is not None:  # else nothing can be fetched yet
            await self._relay.exports.serve(connection)

    async def _run(self) -> str | None:
        listener = await self._world.network.listen(self._engine_address, self._serve_engine)
        try:
            process = await self._launcher.launch(listener.address)
            try:
                return await self._watch(process, listener)
            finally:
                await to_the_end(self._end(process))
        finally:
            await listener.close()

    async def _watch(self, process: Process, listener: Listener) -> str | None:
        ended = asyncio.create_task(process.wait(), name="worker.engine")
        connected = asyncio.create_task(self._connected.wait(), name="worker.connected")
        lost = asyncio.create_task(self._lost.wait(), name="worker.lost")
        drained = asyncio.create_task(self._relay.wait_drained(), name="worker.drained")
        tasks: list[asyncio.Task[Any]] = [ended, connected, lost, drained]
        try:
            await asyncio.wait(
                {ended, connected, lost}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if self._start_failure is not None:
                raise CannotStartError(self._start_failure)
            if not (connected.done() or lost.done() or ended.done()):
                return f"no word within {START_TIMEOUT_S:g} s"
            if not connected.done():
                return await self._told(ended)
            began_s = self._world.now()
            members = [asyncio.create_task(s.run(), name="worker.session") for s in self._relay.sessions]
            rejected = asyncio.create_task(self._until_rejected(members), name="worker.rejected")
            tasks += [*members, rejected, asyncio.create_task(self._keep_asking(), name="worker.ping")]
            try:
                await asyncio.wait({ended, lost, drained, rejected}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.served_s = self._world.now() - began_s
                await to_the_end(self._leave(ended))
            if rejected.done():
                rejected.result()  # raises why
            if drained.done():
                return None
            return await self._told(ended)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_rejected(self, members: list[asyncio.Task[None]]) -> None:
        """Raise RejectedError when no gateway is left that may take this worker."""
        open_members = set(members)
        while open_members:
            done, open_members = await asyncio.wait(open_members, return_when=asyncio.FIRST_COMPLETED)
            for member in done:
                try:
                    member.result()
                except RejectedError as error:
                    if not open_members:
                        raise
                    self._report(f"{error}; it stays with the others")
        await asyncio.get_running_loop().create_future()  # it has left: what follows knows why

    async def _told(self, ended: asyncio.Task[str]) -> str:
        """How the engine was lost; where no more is known than that its connection was, its process tells."""
        if not self._how:
            await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
            self._stuck = not ended.done()
        return self._how or (await ended if ended.done() else "a lost connection")

    async def _leave(self, process_ended: asyncio.Task[str]) -> None:
        """Tell the gateways goodbye while the sessions still have their connections."""
        how = self._how
        if not how and self._lost.is_set():  # its connection went first: in a moment it is known how it ended
            await asyncio.wait({process_ended}, timeout=REAP_TIMEOUT_S)
        if not how and process_ended.done() and not self._relay.draining:
            how = process_ended.result()
        ended = "it was drained" if self._relay.draining else "its engine ended"
        reason = f"its engine was lost with {how}" if how else ended
        goodbyes = [asyncio.create_task(session.leave(reason)) for session in self._relay.sessions]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=GOODBYE_TIMEOUT_S)
        for goodbye in goodbyes:
            goodbye.cancel()  # which aborts the connection
        await asyncio.gather(*goodbyes, return_exceptions=True)

    async def _end(self, process: Process) -> None:
        """Stop all transfers, end the process."""
        self._ended = True
        if self._data is not None:
            await self._data.close()
        if self._relay.imports is not None:
            await self._relay.imports.close()
        if self._relay.exports is not None:
            await self._relay.exports.close()
        if self._agent is not None:
            await self._agent.close()
        if self._memory is not None:
            self._memory.close()
        if self._channel is not None:
            self._channel.abort()  # which is how an engine learns that it is to end
        if self._channel is not None and not self._stuck:
            ended = asyncio.create_task(process.wait())
            await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
        await process.kill()

    async def _keep_asking(self) -> None:
        """Give the engine up when it has not answered for too long: its step is stuck."""
        while True:
            asked_s = self._world.now()
            self._tell(Ping())
            await asyncio.sleep(PING_S)
            if self._world.now() - asked_s > 2 * PING_S:
                continue  # this process stood still itself, and what the engine said meanwhile is unread
            limit_s = self._options.step_timeout_s
            if self._relay.silent_s > limit_s:
                self._stuck = True
                self._lose(f"a step that did not end within {limit_s:g} s (--step-timeout)")

    # ---- the engine ----------------------------------------------------------------------------------

    async def _serve_engine(self, connection: Connection) -> None:
        channel: Channel[FromEngine] = Channel(connection, receives=FromEngine)
        if self._channel is not None:
            raise ProtocolError(connection.peer, "dialled in while another engine is connected")
        try:
            first = await channel.receive()
            if isinstance(first, StartFailed):
                self._start_failure = first.message
                self._lost.set()
                return
            if not isinstance(first, EngineReady):
                raise ProtocolError(connection.peer, f"began with {type(first).__name__}, not EngineReady")
            lacks = await self._open_agent(first)
            if self._ended:
                return
            self._begin(channel, first, lacks)
            while (message := await channel.receive()) is not None:
                if isinstance(message, EngineFailed):
                    self._lose(message.message)
                else:
                    self._relay.hear(message)
            self._lose("")
        except ConnectionLost:
            self._lose("")
        except ProtocolError as error:
            self._lose(f"nonsense: {error.reason}")
        except AgentUnavailable as error:
            self._start_failure = f"--connector nixl cannot be had: {error}"
            self._lost.set()
        except OSError as error:  # its memory is not to be had
            self._lose(f"its KV blocks: {error}")

    async def _open_agent(self, ready: EngineReady) -> str:
        """Have blocks read by others without us, and theirs by us; returns why that cannot be.

        Raises AgentUnavailable where it must be.
        """
        wanted = self._options.connector
        if ready.pool is None or self._data is None or wanted == "tcp":
            return ""
        path, size = ready.pool.path, ready.pool.size
        try:
            agent = await self._world.open_agent(
                path, size, self._data.address, self._report, open_to_network=wanted == "nixl"
            )
        except AgentUnavailable as error:
            if wanted == "nixl":
                raise
            return str(error)
        if self._ended:
            await agent.close()
        else:
            self._agent = agent
        return ""

    def _begin(self, channel: Channel[FromEngine], ready: EngineReady, lacks: str) -> None:
        """The engine stands: make what lives with it."""
        options, world = self._options, self._world
        generation = world.random.stream("generations").getrandbits(63)
        relay = self._relay
        if ready.pool is not None and self._data is not None:
            self._memory = world.open_memory(ready.pool.path, ready.pool.size)
            memory, layout = self._memory.buffer, ready.engine.kv_layout
            pool = Pool(memory, ready.pool.block_bytes, ready.pool.block_size, layout)
            relay.exports = Exports(
                world,
                pool,
                worker_id=options.worker_id,
                generation=generation,
                address=self._data.address,
                released=relay.export_released,
                lease_s=options.lease_s,
                agent=self._agent,
            )
            relay.imports = Imports(
                world,
                pool,
                to_engine=self._tell,
                settled=relay.import_settled,
                report=self._report,
                connector=Connector(
                    self._agent, checked=options.check_reads, lacks=lacks, report=self._report
                ),
            )
        info = WorkerInfo(
            worker_id=options.worker_id,
            generation=generation,
            role=options.role,
            data_address=self._data.address if relay.exports is not None and self._data is not None else "",
            engine=ready.engine,
        )
        relay.sessions = [Session(world, address, info, relay, self._report) for address in options.join]
        relay.engine_stands()
        self._channel = channel
        self._connected.set()

    def _lose(self, how: str) -> None:
        self._how = self._how or how
        self._lost.set()

    def _tell(self, message: ToEngine) -> None:
        if self._channel is not None:
            try:
                self._channel.post(message)
            except ConnectionLost:
                self._lose("")
