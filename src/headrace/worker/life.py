"""One life of an engine, from launch to loss, and everything that lives and ends with it.

In: orders from gateways (through sessions) and what the engine says. Out: each to the other. What one step
brought is split by whose request it was; with a single gateway it goes on as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.engine_messages import (
    Accepted,
    EngineFailed,
    EngineReady,
    FromEngine,
    Ping,
    Pong,
    Release,
    Stepped,
    ToEngine,
)
from headrace.protocol.handoff import (
    Computed,
    Declined,
    Dropped,
    Exporting,
    HandoffEvent,
    Held,
    Leg,
    Reserved,
)
from headrace.protocol.messages import (
    Begin,
    Cancel,
    Draining,
    ExportEnded,
    ExportOffered,
    Fetch,
    Heartbeat,
    ImportDeclined,
    ImportReserved,
    ImportSettled,
    Outputs,
    SequenceTimes,
    StartFailed,
    Submit,
    WorkerInfo,
)
from headrace.protocol.requests import SequenceOutput
from headrace.transfer import Exports, Pool
from headrace.worker.imports import Imports
from headrace.worker.options import WorkerOptions
from headrace.worker.session import Session
from headrace.world import Connection, ConnectionLost, Listener, Memory, World
from headrace.world.launcher import Launcher, Process, to_the_end

START_TIMEOUT_S = 600.0
"""How long an engine may take to load its model."""

LEAVE_TIMEOUT_S = 5.0
"""How long an engine without a connection may take to end before it is killed."""

GOODBYE_TIMEOUT_S = 2.0
"""How long gateways may take to hear the goodbye of a worker whose engine is lost."""

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
        self._start_failure: str | None = None
        self._exports: Exports | None = None
        self._imports: Imports | None = None
        self._memory: Memory | None = None
        self._sessions: list[Session] = []
        self._owner: dict[str, Session] = {}
        self._export_owner: dict[str, Session] = {}
        self._step = 0
        self._answered_s = 0.0
        self._changed = asyncio.Event()
        self.draining = False
        self.served_s: float | None = None
        """How long the engine has served; None for one that never did."""

    @property
    def is_ready(self) -> bool:
        return self._connected.is_set()

    def open_legs(self) -> dict[str, int]:
        """What is owed to gateways and other workers, for those who check that nothing is left."""
        return {
            "attempts": len(self._owner),
            "exports": max(len(self._exports or ()), len(self._export_owner)),
            "imports": len(self._imports or ()),
        }

    # ---- from launch to loss -------------------------------------------------------------------------

    async def run(self) -> str | None:
        """See one engine through its life; returns how it was lost, or None when it was drained.

        Raises CannotStartError when the engine says that it cannot start, RejectedError when a gateway does
        not take it. Cancelled, it ends the engine first.
        """
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
        drained = asyncio.create_task(self._wait_drained(), name="worker.drained")
        tasks: list[asyncio.Task[Any]] = [ended, connected, lost, drained]
        try:
            await asyncio.wait(
                {ended, connected, lost}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if self._start_failure is not None:
                raise CannotStartError(self._start_failure)
            if not connected.done():
                return await ended if ended.done() else f"no word within {START_TIMEOUT_S:g} s"
            began_s = self._world.now()
            members = [asyncio.create_task(s.run(), name="worker.session") for s in self._sessions]
            tasks += [*members, asyncio.create_task(self._keep_asking(), name="worker.ping")]
            try:
                await asyncio.wait({ended, lost, drained, *members}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.served_s = self._world.now() - began_s
                await to_the_end(self._leave())
            for member in members:
                if member.done():
                    member.result()  # raises why it was rejected
            if drained.done():
                return None
            await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
            return self._how or (await ended if ended.done() else "a lost connection")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self) -> None:
        """Tell the gateways goodbye while the sessions still have their connections."""
        ended = "it was drained" if self.draining else "its engine ended"
        reason = f"its engine was lost with {self._how}" if self._how else ended
        goodbyes = [asyncio.create_task(session.leave(reason)) for session in self._sessions]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=GOODBYE_TIMEOUT_S)
        for goodbye in goodbyes:
            goodbye.cancel()  # which aborts the connection
        await asyncio.gather(*goodbyes, return_exceptions=True)

    async def _end(self, process: Process) -> None:
        """Stop all transfers, end the process."""
        if self._imports is not None:
            await self._imports.close()
        if self._exports is not None:
            await self._exports.close()
        if self._memory is not None:
            self._memory.close()
        if self._channel is not None:
            self._channel.abort()  # which is how an engine learns that it is to end
            ended = asyncio.create_task(process.wait())
            await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
        await process.kill()

    async def _keep_asking(self) -> None:
        """Give the engine up when it has not answered for too long: its step is stuck."""
        while True:
            self._tell(Ping())
            await asyncio.sleep(PING_S)
            silent_s = self._world.now() - self._answered_s
            if silent_s > self._options.step_timeout_s:
                self._lose(f"a step that did not end within {self._options.step_timeout_s:g} s")

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
            await self._begin(channel, first)
            while (message := await channel.receive()) is not None:
                self._answered_s = self._world.now()
                self._hear(message)
            self._lose("")
        except ConnectionLost:
            self._lose("")
        except ProtocolError as error:
            self._lose(f"nonsense: {error.reason}")

    async def _begin(self, channel: Channel[FromEngine], ready: EngineReady) -> None:
        """The engine stands: make what lives with it."""
        options, world = self._options, self._world
        generation = world.random.stream("generations").getrandbits(63)
        if ready.pool is not None:
            self._memory = world.open_memory(ready.pool.path, ready.pool.size)
            memory, layout = self._memory.buffer, ready.engine.kv_layout
            pool = Pool(memory, ready.pool.block_bytes, ready.pool.block_size, layout)
            self._exports = Exports(
                world,
                pool,
                worker_id=options.worker_id,
                generation=generation,
                released=self._export_released,
                lease_s=options.lease_s,
            )
            await self._exports.listen(options.data_address)
            self._imports = Imports(world, pool, to_engine=self._tell, settled=self._import_settled)
        info = WorkerInfo(
            worker_id=options.worker_id,
            generation=generation,
            role=options.role,
            transfers=ready.pool is not None,
            engine=ready.engine,
        )
        self._sessions = [Session(world, address, info, self, self._report) for address in options.join]
        self._channel = channel
        self._answered_s = world.now()
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

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Accepted(handoffs=handoffs):
                for event in handoffs:
                    self._on_handoff(event)
            case Stepped() as stepped:
                self._step = stepped.stats.step
                # What led to the outputs is told before them, and what ends an attempt after them.
                endings = [event for event in stepped.handoffs if isinstance(event, Held | Dropped)]
                for event in stepped.handoffs:
                    if event not in endings:
                        self._on_handoff(event)
                self._pass_on(stepped)
                for event in endings:
                    self._on_handoff(event)
            case Pong(step=step):
                self._step = step
            case EngineFailed(message=text):
                self._lose(text)
            case _:
                raise ProtocolError("the engine", f"said {type(message).__name__} out of turn")

    def _pass_on(self, stepped: Stepped) -> None:
        """Give every gateway what one step brought for its requests, and the state after it."""
        if len(self._sessions) == 1:
            self._sessions[0].post(Outputs(stepped.outputs, stepped.stats, stepped.times))
        else:
            self._split(stepped)
        for output in stepped.outputs:
            if output.finish is not None:
                self._close(output.request_id)

    def _split(self, stepped: Stepped) -> None:
        parts: dict[Session, tuple[list[SequenceOutput], list[SequenceTimes]]]
        parts = {session: ([], []) for session in self._sessions}
        times = iter(stepped.times)
        for output in stepped.outputs:
            took = next(times, None) if output.finish is not None else None
            owner = self._owner.get(output.request_id)
            if owner is not None:
                parts[owner][0].append(output)
                if took is not None:
                    parts[owner][1].append(took)
        for session, (outputs, part_times) in parts.items():
            session.post(Outputs(outputs, stepped.stats, part_times))

    def _close(self, request_id: str) -> None:
        """A sample of an attempt has ended."""
        session = self._owner.get(request_id)
        if session is None:
            return
        session.open[request_id] -= 1
        if session.open[request_id] == 0:
            self._forget_attempt(session, request_id)

    def _forget_attempt(self, session: Session, request_id: str) -> None:
        session.open.pop(request_id, None)
        self._owner.pop(request_id, None)
        self._tell_changed()

    # ---- handoffs ------------------------------------------------------------------------------------

    def _on_handoff(self, event: HandoffEvent) -> None:
        if self._exports is None or self._imports is None:
            raise ProtocolError("the engine", "hands over blocks, and its pool is not known")
        request_id = event.request_id
        owner = self._owner.get(request_id)
        match event:
            case Reserved():
                self._imports.reserved(event)
                if owner is not None:
                    owner.post(ImportReserved(request_id, event.prompt_tokens, event.cached_tokens))
            case Declined():
                if owner is not None:
                    owner.post(ImportDeclined(request_id, event.cached_tokens))
            case Exporting():
                ticket = self._exports.offer(event)
                if owner is not None:
                    self._export_owner[request_id] = owner
                    owner.post(ExportOffered(request_id, ticket))
            case Computed():
                self._exports.computed(event)
            case Held():
                self._exports.held(request_id)
                self._close(request_id)
            case Dropped():
                if request_id in self._exports:
                    self._exports.drop(request_id)
                else:
                    self._imports.drop(request_id)

    def _export_released(self, request_id: str, how: str) -> None:
        self._tell(Release(request_id))
        owner = self._export_owner.pop(request_id, None)
        if owner is not None:
            owner.post(ExportEnded(request_id, how))
        self._tell_changed()

    def _import_settled(self, settled: ImportSettled) -> None:
        owner = self._owner.get(settled.request_id)
        if owner is not None:
            owner.post(settled)

    # ---- gateways' orders ----------------------------------------------------------------------------

    def submit(self, session: Session, submit: Submit) -> None:
        request = submit.request
        if request.request_id in self._owner:
            raise ProtocolError(session.address, f"submits {request.request_id!r} twice")
        samples = 1 if submit.leg is Leg.EXPORT else request.sampling.n - len(submit.progress.ended)
        self._owner[request.request_id] = session
        session.open[request.request_id] = samples
        self._tell(submit)

    def fetch(self, order: Fetch) -> None:
        if self._imports is not None:
            self._imports.fetch(order.request_id, order.ticket)

    def begin(self, order: Begin) -> None:
        if self._imports is not None:
            self._imports.begin(order.request_id, order.generated)

    def cancel(self, order: Cancel) -> None:
        self._tell(order)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self._step, self._world.now() - self._answered_s)

    def forget(self, session: Session) -> None:
        """A gateway is gone: so is whatever it had asked for."""
        for request_id in list(session.open):
            self._tell(Cancel(request_id))
            self._forget_attempt(session, request_id)
        for request_id, owner in list(self._export_owner.items()):
            if owner is session:
                self._tell(Cancel(request_id))

    # ---- drain ---------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take nothing new; `run` returns None when everything is over."""
        if not self.draining:
            self.draining = True
            for session in self._sessions:
                session.post(Draining())
            self._tell_changed()

    async def _wait_drained(self) -> None:
        while not self.draining or self._owner or (self._exports is not None and len(self._exports)):
            await self._changed.wait()

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
