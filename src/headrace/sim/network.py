"""The simulated network: hosts with names, links between them, and every way they can fail.

In: `listen` and `connect` of the programs on its hosts, and faults from whoever writes the scenario. Out:
`Connection`s with the contract of `world/network.py`, carried by `sim/transport.py`. It must not know what
runs on a host: killing a host's tasks is its launcher's business, which calls `crash_host` with it.

Addresses are `name:port`; a host listens under its own name only. Every fault takes effect at the virtual
instant of the call. What each looks like to the two sides:

| fault                  | who learns what                                                                  |
|------------------------|----------------------------------------------------------------------------------|
| `break_connections`    | both sides: ConnectionLost, at once or after that many more bytes                |
| `partition`, both ways | nobody, until it heals (bytes flow on) or a sender's time-out (ConnectionLost)   |
| `partition`, one way   | bytes still flow the other way, unacknowledged: their sender times out too       |
| `crash_host`, RESET    | peers: ConnectionLost after one way; new connections are refused                 |
| `crash_host`, END      | peers read what was sent, then the end of the stream; on writing, ConnectionLost |
| `crash_host`, SILENT   | peers: nothing, until a sender's time-out; new connections time out              |
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.sim.clock import HostClock
from headrace.sim.connection import SimConnection
from headrace.sim.link import DATACENTRE, LOOPBACK, Armed, Link, LinkProfile, Machine
from headrace.sim.loop import VirtualLoop
from headrace.sim.transport import Pipe, SimTransport, WireLimits, break_connection, connect_ends
from headrace.world import ConnectFailed, Connection, Handler, Listener, Network, RandomStreams, TraceValue
from headrace.world.connection import HandlerTasks, TransportConnection
from headrace.world.network import join_host_port, split_host_port

FIRST_EPHEMERAL_PORT = 49152

WINDOW_BYTES = 256 * 1024
"""Default for bytes sent and not yet read by the other program, per direction of a connection."""

RETRANSMISSION_TIMEOUT_S = 900.0
"""Default for how long a sender waits for any acknowledgement; Linux gives up after about 15 minutes."""


class Crash(enum.Enum):
    """How a host's end looks to the others."""

    RESET = "reset"
    """The process dies and its kernel resets its connections, as it does when it holds unread bytes."""
    END = "end"
    """The process dies and its kernel ends its streams, as it does otherwise."""
    SILENT = "silent"
    """The machine is gone: no power, or no cable."""


@dataclass(frozen=True)
class Wiring:
    """What connections are made of."""

    pipe: type[Pipe] = Pipe
    """One direction of one."""
    connection: Callable[[str, Callable[[TransportConnection], None] | None], SimConnection] = SimConnection
    """What a program has of it, by the peer's address and who is told that it is open."""


PACKETS = Wiring()


@dataclass
class _Host:
    machine: Machine
    alive: bool = True
    incarnation: int = 0
    next_port: int = FIRST_EPHEMERAL_PORT
    listeners: dict[int, _SimListener] = field(default_factory=dict)

    def take_port(self) -> int:
        while self.next_port in self.listeners:
            self.next_port += 1
        self.next_port += 1
        return self.next_port - 1


class SimNetwork:
    """All hosts and links of one simulation. `host(name)` is the `Network` of the programs on that host."""

    def __init__(
        self,
        loop: VirtualLoop,
        random: RandomStreams,
        *,
        link: LinkProfile = DATACENTRE,
        loopback: LinkProfile = LOOPBACK,
        window_bytes: int = WINDOW_BYTES,
        retransmission_timeout_s: float = RETRANSMISSION_TIMEOUT_S,
        wiring: Wiring = PACKETS,
    ) -> None:
        """`link` holds between hosts and `loopback` within one, until `set_link` says otherwise."""
        self.loop = loop
        self._random = random
        self._profile = link
        self._loopback = loopback
        self._limits = WireLimits(window_bytes, retransmission_timeout_s)
        self._wiring = wiring
        self._hosts: dict[str, _Host] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._ends: dict[SimTransport, None] = {}

    def host(self, name: str) -> Network:
        """The network as a program sees it that starts on host `name` now; the host is made if it is new.

        After a crash of the host this view is dead for good; ask again after `restart_host`.
        """
        if ":" in name or not name:
            raise ValueError(f"host name {name!r}: one or more characters, no colon")
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host(Machine(name))
        if not host.alive:
            raise RuntimeError(f"host {name} has crashed: call restart_host first")
        return _HostNetwork(self, host)

    def clock(self, name: str) -> HostClock:
        """What the programs on a host take for the time; the host is made if it is new."""
        if name not in self._hosts:
            self.host(name)
        return self._known(name).machine.clock

    # Faults and the shape of the network.

    def set_link(self, source: str, target: str, profile: LinkProfile) -> None:
        """Change one direction between two hosts, from the next packet on."""
        self._link(source, target).profile = profile

    def partition(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Let nothing through from `a` to `b`, and unless `one_way`, from `b` to `a`."""
        self._note("partition", a, b, one_way)
        self._link(a, b).blocked = True
        if not one_way:
            self._link(b, a).blocked = True

    def heal(self, a: str, b: str) -> None:
        """End every partition between `a` and `b`; what was held flows now."""
        self._note("heal", a, b)
        for link in (self._link(a, b), self._link(b, a)):
            if link.blocked:
                link.blocked = False
                link.release()

    def break_connections(
        self,
        a: str,
        b: str,
        *,
        after_bytes: int | None = None,
        acted: Callable[[], None] = lambda: None,
    ) -> None:
        """Break every connection between `a` and `b` now.

        With `after_bytes`, only the one that carries that byte, counted from now over all that `a` sends to
        `b`: exactly so many bytes arrive, then both its sides lose it. `acted` is called where one breaks.
        """
        self._note("break", a, b, after_bytes)
        if after_bytes is not None:
            if after_bytes < 0:
                raise ValueError(f"break_connections: after_bytes is {after_bytes}, and cannot be negative")
            self._link(a, b).breaks = Armed(after_bytes, acted)
            return
        ends = [end for end in self._ends if {end.here, end.peer.here} == {a, b}]
        for end in ends:
            break_connection(end)
        if ends:
            acted()

    def corrupt(self, a: str, b: str, *, after_bytes: int, acted: Callable[[], None] = lambda: None) -> None:
        """Invert the byte that follows `after_bytes` others, counted from now over all that `a` sends to `b`.

        None of the programs is told; `acted` is called when it happens. A byte that never arrives is not made
        up for by another.
        """
        if after_bytes < 0:
            raise ValueError(f"corrupt: after_bytes is {after_bytes}, and cannot be negative")
        self._note("corrupt", a, b, after_bytes)
        self._link(a, b).corrupts = Armed(after_bytes, acted)

    def disarm(self) -> None:
        """Take back what `break_connections` and `corrupt` have set for bytes that were not sent yet."""
        for link in self._links.values():
            link.breaks = link.corrupts = None

    def packets(self, a: str, b: str) -> tuple[int, int]:
        """How many have left `a` for `b` or the other way round so far, and how many of them were stopped."""
        links = self._link(a, b), self._link(b, a)
        return sum(link.sent for link in links), sum(link.stopped for link in links)

    def crash_host(self, name: str, how: Crash = Crash.RESET) -> None:
        """Everything on the host is dead at once: its listeners, its connections, its view of the network."""
        self._note("crash", name, how.value)
        host = self._known(name)
        host.alive = False
        host.incarnation += 1
        host.listeners.clear()
        host.machine.silent = how is Crash.SILENT
        for end in [end for end in self._ends if end.here == name]:
            if how is Crash.END:
                end.orphan("its host crashed")
            else:
                end.send_reset()  # a silent machine sends nothing
                end.fail("its host crashed")
        if how is Crash.SILENT:
            for link in self._links.values():
                if link.source is host.machine:
                    link.forget()

    def restart_host(self, name: str) -> None:
        """Bring a crashed host back, with nothing running; what peers still repeat to it is reset."""
        self._note("restart", name)
        host = self._known(name)
        host.alive = True
        if host.machine.silent:
            host.machine.silent = False
            for link in self._links.values():
                if link.target is host.machine and not link.blocked:
                    link.release()

    # For the hosts' views.

    def _known(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            raise ValueError(f"no host is called {name!r}; there are {', '.join(self._hosts) or 'none'}")
        return host

    def _link(self, source: str, target: str) -> Link:
        link = self._links.get((source, target))
        if link is None:
            ends = self._known(source).machine, self._known(target).machine
            profile = self._loopback if source == target else self._profile
            chance = self._random.stream(f"link {source}->{target}")
            link = self._links[source, target] = Link(self.loop, *ends, profile, chance)
        return link

    def _note(self, *event: TraceValue) -> None:
        self.loop.trace("network", *event)

    def _call(
        self, caller: _Host, peer: str, host: str, port: int, answer: asyncio.Future[Connection]
    ) -> None:
        """Send a connection request; `answer` gets the connection, or why there is none."""
        name = caller.machine.name
        there, back = self._link(name, host), self._link(host, name)
        callee = self._hosts[host]
        local = join_host_port(name, caller.take_port())
        life = caller.incarnation

        def requested() -> None:
            listening = callee.alive and port in callee.listeners
            back.send(0, accepted if listening else refused)

        def refused() -> None:
            if not answer.done():
                answer.set_exception(ConnectFailed(peer, "nothing listens there"))

        def accepted() -> None:
            if answer.done() or caller.incarnation != life:
                return
            ends = self.loop, self._limits, there, back, self._forget_end
            near, far = connect_ends(*ends, self._wiring.pipe)
            self._ends[near] = self._ends[far] = None
            far.expect(handshake_completed)
            connection = self._wiring.connection(peer, None)
            near.open(connection)
            self._note("connected", local, peer)
            answer.set_result(connection)

        def handshake_completed() -> SimConnection | None:
            listener = callee.listeners.get(port)
            if listener is None:
                return None
            return self._wiring.connection(local, listener.tasks.accept)

        there.send(0, requested)

    def _forget_end(self, end: SimTransport) -> None:
        self._ends.pop(end, None)


class _HostNetwork(Network):
    """The network of one host, for one life of that host. All its connections are plain."""

    def __init__(self, network: SimNetwork, host: _Host) -> None:
        self._network = network
        self._host = host
        self._incarnation = host.incarnation

    @property
    def _dead(self) -> bool:
        return self._host.incarnation != self._incarnation

    async def listen(self, address: str, handler: Handler, *, plain: bool = False) -> Listener:
        name, port = split_host_port(address)
        host = self._host
        if self._dead:
            raise _no_listener(address, errno.ENETDOWN, f"host {host.machine.name} has crashed")
        if name != host.machine.name:
            raise _no_listener(address, errno.EADDRNOTAVAIL, f"this host is {host.machine.name}")
        port = port or host.take_port()
        if port in host.listeners:
            raise _no_listener(address, errno.EADDRINUSE, os.strerror(errno.EADDRINUSE).lower())
        listener = _SimListener(join_host_port(name, port), HandlerTasks(handler), host.listeners, port)
        host.listeners[port] = listener
        return listener

    async def connect(self, address: str, *, timeout_s: float, plain: bool = False) -> Connection:
        name, port = split_host_port(address)
        if self._dead:
            raise ConnectFailed(address, f"host {self._host.machine.name} has crashed")
        if name not in self._network._hosts:
            raise ConnectFailed(address, "the name cannot be resolved")
        answer: asyncio.Future[Connection] = self._network.loop.create_future()
        self._network._call(self._host, address, name, port, answer)
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await answer
                except asyncio.CancelledError:
                    if not answer.cancelled() and answer.exception() is None:
                        answer.result().abort()  # it came about, and nobody is left to take it
                    raise
        except TimeoutError as error:
            raise ConnectFailed(address, f"no answer within {timeout_s:g} s") from error


class _SimListener(Listener):
    def __init__(
        self, address: str, tasks: HandlerTasks, listeners: dict[int, _SimListener], port: int
    ) -> None:
        self.address = address
        self.tasks = tasks
        self._listeners = listeners
        self._port = port

    async def close(self) -> None:
        if self._listeners.get(self._port) is self:
            del self._listeners[self._port]


def _no_listener(address: str, code: int, reason: str) -> OSError:
    return OSError(code, f"cannot listen at {address}: {reason}")
