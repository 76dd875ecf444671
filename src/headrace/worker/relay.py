"""What passes between one engine and its gateways: orders one way, what each step brought the other.

In: gateways' orders (through sessions), and what the engine says. Out: each to the other; what the engine
says of handoffs goes to the transfers first. What one step brought is split by whose request it was; with a
single gateway it goes on as it is. It must not know processes, or when an engine is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.protocol.channel import ProtocolError
from headrace.protocol.engine_messages import Accepted, FromEngine, Pong, Release, Stepped, ToEngine
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
    KVSnapshot,
    Outputs,
    SequenceTimes,
    Submit,
)
from headrace.protocol.requests import SequenceOutput
from headrace.transfer import Exports
from headrace.worker.imports import Imports
from headrace.worker.kv_report import KVMirror
from headrace.worker.session import Session
from headrace.world import World


class Relay:
    """For one life of an engine. `sessions`, `exports` and `imports` are filled in when the engine stands."""

    def __init__(self, world: World, tell: Callable[[ToEngine], None]) -> None:
        """`tell` says something to the engine."""
        self._world = world
        self._tell = tell
        self.sessions: list[Session] = []
        self.exports: Exports | None = None
        self.imports: Imports | None = None
        self._owner: dict[str, Session] = {}
        self._export_owner: dict[str, Session] = {}
        self._kv = KVMirror()
        self._step = 0
        self._answered_s = 0.0
        self._changed = asyncio.Event()
        self.draining = False

    @property
    def silent_s(self) -> float:
        """How long the engine has not said anything."""
        return self._world.now() - self._answered_s

    def open_legs(self) -> dict[str, int]:
        """What is owed to gateways and other workers, for those who check that nothing is left."""
        return {
            "attempts": len(self._owner),
            "exports": max(len(self.exports or ()), len(self._export_owner)),
            "imports": len(self.imports or ()),
        }

    # ---- the engine ----------------------------------------------------------------------------------

    def engine_stands(self) -> None:
        """Its silence is counted from here."""
        self._answered_s = self._world.now()

    def hear(self, message: FromEngine) -> None:
        """The engine says something. Raises ProtocolError for what it may not say now."""
        self._answered_s = self._world.now()
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
                if stepped.kv is not None:
                    self._kv.apply(stepped.kv)
                    for session in self.sessions:
                        session.kv_changed(stepped.kv)
                self._pass_on(stepped)
                for event in endings:
                    self._on_handoff(event)
            case Pong(step=step):
                self._step = step
            case _:
                raise ProtocolError("the engine", f"said {type(message).__name__} out of turn")

    def _pass_on(self, stepped: Stepped) -> None:
        """Give every gateway what one step brought for its requests, and the state after it."""
        if len(self.sessions) == 1:
            self.sessions[0].post(Outputs(stepped.outputs, stepped.stats, stepped.times, stepped.taken))
        else:
            self._split(stepped)
        for output in stepped.outputs:
            if output.finish is not None:
                self._close(output.request_id)

    def _split(self, stepped: Stepped) -> None:
        parts: dict[Session, tuple[list[SequenceOutput], list[SequenceTimes]]]
        parts = {session: ([], []) for session in self.sessions}
        times = iter(stepped.times)
        for output in stepped.outputs:
            took = next(times, None) if output.finish is not None else None
            owner = self._owner.get(output.request_id)
            if owner is not None:
                parts[owner][0].append(output)
                if took is not None:
                    parts[owner][1].append(took)
        for session, (outputs, part_times) in parts.items():
            taken = [name for name in stepped.taken if name in session.open]
            session.post(Outputs(outputs, stepped.stats, part_times, taken))

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
        if self.exports is None or self.imports is None:
            raise ProtocolError("the engine", "hands over blocks, and its pool is not known")
        request_id = event.request_id
        owner = self._owner.get(request_id)
        match event:
            case Reserved():
                self.imports.reserved(event)
                if owner is not None:
                    owner.post(ImportReserved(request_id, event.prompt_tokens, event.cached_tokens))
            case Declined():
                if owner is not None:
                    owner.post(ImportDeclined(request_id, event.cached_tokens))
            case Exporting():
                ticket = self.exports.offer(event)
                if owner is not None:
                    self._export_owner[request_id] = owner
                    owner.post(ExportOffered(request_id, ticket))
            case Computed():
                self.exports.computed(event)
            case Held():
                self.exports.held(request_id)
                self._close(request_id)
            case Dropped():
                if request_id in self.exports:
                    self.exports.drop(request_id)
                else:
                    self.imports.drop(request_id)

    def export_released(self, request_id: str, how: str) -> None:
        """Nothing touches the blocks of an export any more."""
        self._tell(Release(request_id))
        owner = self._export_owner.pop(request_id, None)
        if owner is not None:
            owner.post(ExportEnded(request_id, how))
        self._tell_changed()

    def import_settled(self, settled: ImportSettled) -> None:
        """A pull has ended."""
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
        if self.imports is not None:
            self.imports.fetch(order.request_id, order.ticket)

    def begin(self, order: Begin) -> None:
        if self.imports is not None:
            self.imports.begin(order.request_id, order.generated)

    def cancel(self, order: Cancel) -> None:
        self._tell(order)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self._step, self.silent_s, self._kv.number)

    def kv_snapshot(self) -> KVSnapshot:
        return self._kv.snapshot()

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
        """Take nothing new."""
        if not self.draining:
            self.draining = True
            for session in self.sessions:
                session.post(Draining())
            self._tell_changed()

    async def wait_drained(self) -> None:
        """Wait until it drains, and nothing is open or kept for others."""
        while not self.draining or self._owner or (self.exports is not None and len(self.exports)):
            await self._changed.wait()

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
