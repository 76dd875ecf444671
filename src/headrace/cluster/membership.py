"""How workers become members and cease to be: the listening side of the control channel, and the watch.

In: connections and time. Out: calls to the gateway, and the registry's states.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Protocol

from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import Member, MemberState, Registry, Unfit, UnfitNow
from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.messages import (
    PROTOCOL_VERSION,
    Beat,
    Draining,
    FromWorker,
    Heartbeat,
    Hello,
    Leaving,
    Rejected,
    StartFailed,
    Welcome,
)
from headrace.world import Connection, ConnectionLost, Listener, World

HELLO_TIMEOUT_S = 10.0
"""A worker dials in when its engine stands, so its first word comes at once."""


CLOSE_TIMEOUT_S = 2.0
"""How long workers may take to read the last that they are told."""


class Host(Protocol):
    """Who wants to know."""

    @property
    def open_samples(self) -> int: ...
    def member_up(self, member: Member) -> None: ...
    def member_failed(self, message: str) -> None: ...
    def member_lost(self, member: Member, why: str, *, died: bool) -> None: ...
    def heard(self, member: Member, message: FromWorker) -> None: ...
    def has_room(self, member: Member) -> None: ...
    def member_became(self, member: Member, state: MemberState) -> None: ...


class Membership:
    """From `listen` to `close`."""

    def __init__(self, world: World, options: GatewayOptions, registry: Registry, host: Host) -> None:
        self._world = world
        self._options = options
        self._registry = registry
        self._host = host
        self._listeners: list[Listener] = []
        self._watch: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it listens first."""
        if not self._listeners:
            raise RuntimeError("the gateway does not listen yet")
        return self._listeners[0].address

    async def listen(self, address: str, *, own: bool) -> str:
        """Let workers dial in; what they say of not coming counts only for our own."""
        serve = functools.partial(self._serve, own=own)
        listener = await self._world.network.listen(address, serve)
        self._listeners.append(listener)
        self._registry.opened(self._world.now())
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_members(), name="gateway.watch")
        return listener.address

    async def close(self) -> None:
        """Listen no more, and let every member go."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for listener in self._listeners:
            await listener.close()
        members = list(self._registry.live())
        for member in members:
            self._lose(member, "the gateway stops", died=False)
        closing = [asyncio.create_task(member.channel.close()) for member in members]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)
        for task, member in zip(closing, members, strict=True):
            if not task.done():  # it does not read what it was told last
                task.cancel()
                member.channel.abort()
        await asyncio.gather(*closing, return_exceptions=True)

    async def _serve(self, connection: Connection, *, own: bool) -> None:
        channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await channel.receive()
        except TimeoutError:
            connection.abort()
            return
        if isinstance(first, StartFailed):
            self._world.trace("gateway.start failed", first.message)
            if own:
                self._host.member_failed(first.message)
            return
        if not isinstance(first, Hello) or first.protocol != PROTOCOL_VERSION:
            said = f"protocol {first.protocol}" if isinstance(first, Hello) else type(first).__name__
            channel.post(Rejected(f"the gateway speaks protocol {PROTOCOL_VERSION}, the worker said {said}"))
            return
        try:
            former = self._registry.register(
                first.worker, channel, self._world.now(), owes=self._host.open_samples > 0
            )
        except Unfit as unfit:
            self._world.trace("gateway.rejected", first.worker.worker_id, str(unfit))
            channel.post(Rejected(str(unfit), later=isinstance(unfit, UnfitNow)))
            return
        if former is not None:
            former.channel.abort()
            self._lose(former, "it dialled in again", died=True)
        member = self._registry.get(first.worker.worker_id)
        if member is None or member.channel is not channel:
            raise RuntimeError("a registered worker is not in the registry")
        channel.post(Welcome(self._options.heartbeat_s, self._options.lapse_s))
        self._world.trace("gateway.member", member.worker_id, first.worker.generation)
        self._host.member_up(member)
        await self._hear(member, channel)

    async def _hear(self, member: Member, channel: Channel[FromWorker]) -> None:
        why = "its connection ended"
        died = True
        try:
            while (message := await channel.receive()) is not None and member.is_live:
                member.heard_s = self._world.now()
                if member.state is MemberState.SUSPECT:
                    self._become(member, MemberState.UP)
                match message:
                    case Heartbeat(step=step, silent_s=silent_s):
                        member.step, member.engine_silent_s = step, silent_s
                        self._host.has_room(member)
                        self._host.heard(member, message)
                    case Draining():
                        self._become(member, MemberState.DRAINING)
                    case Leaving(reason=reason):
                        why = reason
                        died = member.state is not MemberState.DRAINING
                        break
                    case _:
                        self._host.heard(member, message)
        except ConnectionLost as loss:
            why = f"its connection was lost: {loss.reason}"
        except ProtocolError as error:
            why = f"it spoke nonsense: {error.reason}"
        finally:
            self._lose(member, why, died=died)

    def _lose(self, member: Member, why: str, *, died: bool) -> None:
        if member.is_live:
            self._registry.down(member, why, self._world.now())
            self._world.trace("gateway.lost", member.worker_id, why)
            self._host.member_lost(member, why, died=died)

    def _become(self, member: Member, state: MemberState) -> None:
        member.state = state
        self._world.trace("gateway.state", member.worker_id, state)
        self._host.member_became(member, state)

    async def _watch_members(self) -> None:
        """Say that we live; suspect who is silent, and give up who is silent for too long."""
        options = self._options
        while True:
            await asyncio.sleep(options.heartbeat_s)
            now = self._world.now()
            self._registry.forget(now)
            for member in list(self._registry.live()):
                silent_s = now - member.heard_s
                if silent_s > options.lapse_s:
                    self._lose(member, f"it was silent for {silent_s:.1f} s", died=True)
                    member.channel.abort()
                    continue
                if silent_s > options.suspect_after_s and member.state is MemberState.UP:
                    self._become(member, MemberState.SUSPECT)
                try:
                    member.channel.post(Beat())
                except ConnectionLost:
                    continue  # whoever reads from it learns the same
