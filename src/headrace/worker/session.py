"""A worker's membership in one cluster: the connection with one gateway, made again when it is lost.

In: the gateway's orders, and what the engine brings for this gateway's requests. Out: orders for the engine,
and answers. Requests of a gateway that is gone are cancelled: nobody would read what they bring.

    dial ──Hello──▶ Welcome ──▶ registered ──lost, or silent for `lapse_s`──▶ dial again
                      └▶ Rejected: the end, or dial again

Whatever keeps it from being a member is said to people, each reason once until it is one again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.messages import (
    PROTOCOL_VERSION,
    Beat,
    Begin,
    Cancel,
    Drain,
    Draining,
    Fetch,
    FromGateway,
    FromWorker,
    Heartbeat,
    Hello,
    KVEvents,
    KVSnapshot,
    KVWanted,
    Leaving,
    Refused,
    Rejected,
    Submit,
    Welcome,
    WorkerInfo,
)
from headrace.world import ConnectFailed, ConnectionLost, World

CONNECT_TIMEOUT_S = 5.0
WELCOME_TIMEOUT_S = 10.0
UNWELCOMED_BEAT_S = 1.0
"""How often a worker that waits to be welcomed says that it lives: who says nothing never learns that the
machine went down without a word and is back."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
"""Pauses between attempts to dial a gateway, doubled until it welcomes this worker; a restarted one must know
its cluster within two heartbeats."""

_NO_ANSWER = f"no answer within {WELCOME_TIMEOUT_S:g} s"


class RejectedError(Exception):
    """The gateway does not take this worker; the text is the gateway's."""


class Orders(Protocol):
    """What a session does with a gateway's orders."""

    draining: bool

    def submit(self, session: Session, submit: Submit) -> None: ...
    def fetch(self, order: Fetch) -> None: ...
    def begin(self, order: Begin) -> None: ...
    def cancel(self, order: Cancel) -> None: ...
    def drain(self) -> None: ...
    def heartbeat(self) -> Heartbeat: ...
    def kv_snapshot(self) -> KVSnapshot: ...
    def forget(self, session: Session) -> None: ...


class Session:
    """One gateway of one life of an engine."""

    def __init__(
        self, world: World, address: str, info: WorkerInfo, orders: Orders, report: Callable[[str], None]
    ) -> None:
        """`report` gets lines for people."""
        self._world = world
        self._address = address
        self._info = info
        self._orders = orders
        self._report = report
        self._said: set[str] = set()
        """What people know of why this is no member."""
        self._pause_s = FIRST_PAUSE_S
        self._welcome = False
        self._given_up = ""
        self._channel: Channel[FromGateway] | None = None
        self._heard_s = 0.0
        self._left = False
        self.open: dict[str, int] = {}
        """Attempts of this gateway, and how many samples of each have not ended."""
        self._tells_kv = False

    @property
    def address(self) -> str:
        return self._address

    async def run(self) -> None:
        """Be a member until cancelled; while it drains, until this gateway is gone. Raises RejectedError."""
        while True:
            trouble = await self._attempt()
            if self._left or self._orders.draining:
                return  # what it owed this gateway is over, and it is to get nothing new
            if trouble and trouble not in self._said:
                self._said.add(trouble)
                self._report(f"{trouble}; dialling again")
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    async def _attempt(self) -> str:
        """One connection from its start to its end; returns what was wrong with it. Raises RejectedError."""
        try:
            connection = await self._world.network.connect(self._address, timeout_s=CONNECT_TIMEOUT_S)
        except ConnectFailed as error:
            return self._cannot_join(error.reason)
        channel: Channel[FromGateway] = Channel(connection, receives=FromGateway)
        self._welcome, self._given_up = False, ""
        try:
            return await self._serve(channel)
        except (ConnectionLost, ProtocolError, TimeoutError) as error:
            self._world.trace("session.lost", self._address, type(error).__name__)
            reason = error.reason if not isinstance(error, TimeoutError) else _NO_ANSWER
            if not self._welcome:
                return self._cannot_join(reason)
            return f"the gateway at {self._address} was lost: {self._given_up or reason}"
        finally:
            self._channel = None
            if not self._left:
                channel.abort()  # else `leave` still sends its last word
            self._orders.forget(self)

    def _cannot_join(self, reason: str) -> str:
        return f"cannot join the gateway at {self._address}: {reason}"

    async def _serve(self, channel: Channel[FromGateway]) -> str:
        """Be a member on this connection to its end; returns why it was none."""
        answer = await self._say_hello(channel)
        if isinstance(answer, Rejected) and not answer.later:
            raise RejectedError(f"the gateway at {self._address} rejects this worker: {answer.reason}")
        if isinstance(answer, Rejected):
            return f"the gateway at {self._address} does not take this worker yet: {answer.reason}"
        if not isinstance(answer, Welcome):
            return self._cannot_join("it ended the connection without an answer")
        self._channel, self._welcome = channel, True
        self._tells_kv = False
        self._heard_s = self._world.now()
        self._pause_s = FIRST_PAUSE_S
        if self._said:
            self._said.clear()
            self._report(f"joined the gateway at {self._address}")
        if self._orders.draining:
            channel.post(Draining())
        beats = asyncio.create_task(self._beat(channel, answer), name="worker.heartbeat")
        try:
            while (message := await channel.receive()) is not None:
                self._heard_s = self._world.now()
                self._obey(message)
        finally:
            beats.cancel()
        return ""

    async def _say_hello(self, channel: Channel[FromGateway]) -> FromGateway | None:
        """The gateway's answer; None when it ended the connection. Raises TimeoutError, ConnectionLost."""
        channel.post(Hello(PROTOCOL_VERSION, self._info))
        waiting = asyncio.create_task(self._insist(channel), name="worker.unwelcomed")
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                return await channel.receive()
        finally:
            waiting.cancel()

    async def _insist(self, channel: Channel[FromGateway]) -> None:
        """Say that we live, until somebody answers or the network says that nobody will."""
        with contextlib.suppress(ConnectionLost):  # whoever waits for the answer learns the same
            while True:
                await asyncio.sleep(UNWELCOMED_BEAT_S)
                channel.post(self._orders.heartbeat())

    def _obey(self, message: FromGateway) -> None:
        match message:
            case Submit() as submit:
                if self._orders.draining:
                    self.post(Refused(submit.request.request_id, "the worker is draining"))
                else:
                    self._orders.submit(self, submit)
            case Fetch() as order:
                self._orders.fetch(order)
            case Begin() as begin:
                self._orders.begin(begin)
            case Cancel() as cancel:
                self._orders.cancel(cancel)
            case KVWanted():
                self._tells_kv = True
                self.post(self._orders.kv_snapshot())
            case Drain():
                self._orders.drain()
            case Beat() | Welcome() | Rejected():
                pass

    async def _beat(self, channel: Channel[FromGateway], welcome: Welcome) -> None:
        """Tell the gateway that we live; let go of one that says nothing any more."""
        while True:
            await asyncio.sleep(welcome.heartbeat_s)
            if self._world.now() - self._heard_s > welcome.lapse_s:
                self._given_up = f"it was silent for {welcome.lapse_s:g} s"
                channel.abort()
                return
            self.post(self._orders.heartbeat())

    def post(self, message: FromWorker) -> None:
        """Say something, if anybody listens."""
        if self._channel is not None:
            try:
                self._channel.post(message)
            except ConnectionLost:
                self._channel = None  # the reader learns the same

    def kv_changed(self, events: KVEvents) -> None:
        """Tell of the prefix cache, if the gateway wants to know; one that reads too slowly misses it, and
        will ask for everything."""
        if self._tells_kv and self._channel is not None and not self._channel.is_behind:
            self.post(events)

    async def leave(self, reason: str) -> None:
        """Tell the gateway goodbye, if there is one."""
        self._left = True
        if self._channel is not None:
            self.post(Leaving(reason))
            channel, self._channel = self._channel, None
            if channel is not None:
                await channel.close()
