"""The network as the rest of Headrace sees it: listen, connect, and ordered byte streams.

Two implementations stand behind it, real sockets (`world/streams.py`) and a simulated network
(`sim/network.py`), and one conformance suite holds both to the words on this page. Nothing here knows
messages or frames (`protocol/channel.py`), hosts, or what the bytes mean.

Addresses are text: `127.0.0.1:8000`, `[::1]:8000`, `node-3:8000`, `unix:/run/headrace.sock`. Port 0 asks
for any free port; `Listener.address` says which one it became.

What a peer's end looks like. A reset, a broken path or a failed write is `ConnectionLost`. But a process
that is killed is closed by its kernel, and that often looks like the orderly end of its stream: `read`
returns `b""`. So the end of a stream is never proof that the peer finished what it had to say; a protocol
that needs to know says goodbye in its own words. A peer whose machine vanishes, or who is behind a
partition, is noticed only by a writer and only after the retransmission time-out (about 15 minutes with
Linux's defaults); whoever must know sooner sends heartbeats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

UNIX_PREFIX = "unix:"


class ConnectionLost(ConnectionError):
    """The connection is gone: reset by the peer, broken on the way, or closed on this side.

    Once raised, every further `write`, `drain` and (when all received bytes have been read) `read` on that
    connection raises it too.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"connection with {peer} lost: {reason}")
        self.peer = peer
        self.reason = reason


class ConnectFailed(ConnectionError):
    """No connection came about: nothing listens there, the name is unknown, nobody answered in time, or who
    did is not of this cluster.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"cannot connect to {address}: {reason}")
        self.address = address
        self.reason = reason


class Connection(ABC):
    """An ordered stream of bytes in both directions.

    One task reads at a time (a second concurrent read is a RuntimeError); any number may write and drain.
    Cancelling a pending `read`, `read_exactly` or `drain` loses nothing: the next call goes on where it was.
    `write_from` and `read_into` are for bulk bytes, straight from and into the caller's memory.
    """

    peer: str
    """The other side's address, for messages to people."""

    @abstractmethod
    async def read(self, max_bytes: int) -> bytes:
        """Return 1 to `max_bytes` bytes as soon as there are any, or `b""` at the end of the peer's stream.

        After a loss, bytes that had arrived may still be handed out first; then ConnectionLost is raised.
        """

    @abstractmethod
    async def read_exactly(self, n: int) -> bytes:
        """Return exactly `n` bytes.

        Raises asyncio.IncompleteReadError (with what there was in `partial`) when the stream ends before,
        ConnectionLost when the connection does.
        """

    @abstractmethod
    def take(self, n: int) -> bytes | None:
        """Return exactly `n` bytes if they are here already, without a turn of a coroutine."""

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes for sending and return at once; the caller may reuse `data`'s memory immediately.

        The queue is not bounded by this call: await `drain` between writes. Raises ConnectionLost once the
        loss is known, RuntimeError after `write_eof`.
        """

    @abstractmethod
    async def drain(self) -> None:
        """Wait until the queue of unsent bytes is below its high-water mark. Raises ConnectionLost."""

    @property
    @abstractmethod
    def is_behind(self) -> bool:
        """Whether the queue of unsent bytes is above its high-water mark: the peer reads too slowly."""

    @abstractmethod
    async def write_from(self, buffers: Sequence[memoryview]) -> list[int]:
        """Send the buffers in order, after everything written before; return the checksum of each.

        Buffers are contiguous, of any sizes, and may be reused when this returns: the operating system has
        all bytes then, though the peer may not. It waits as long as the peer takes to accept them. Checksums
        are CRC-32C on real sockets; a simulation has its own, and both ends of a connection have the same.

        One task at a time, and nobody else may write meanwhile (RuntimeError). Raises ConnectionLost,
        RuntimeError after `write_eof` and on an encrypted connection. When it is cancelled, or the connection
        is closed or aborted meanwhile, the connection is aborted, and the call ends only when nothing reads
        the buffers any more.
        """

    @abstractmethod
    async def read_into(self, buffers: Sequence[memoryview]) -> list[int]:
        """Fill the buffers in order with the next bytes of the stream; return each checksum as received.

        Buffers are contiguous, writable and of any sizes. Counts as this connection's one reader. Raises
        ConnectionLost, asyncio.IncompleteReadError when the stream ends before (its `partial` is empty: what
        came is in the buffers, as it is after a loss), RuntimeError on an encrypted connection. When it is
        cancelled the connection is aborted, since nobody could say where the stream stands: it is unusable
        from then on. However the call ends, it does so only when nothing writes into the buffers any more.
        """

    @abstractmethod
    def write_eof(self) -> None:
        """End this side's stream once everything queued is sent; reading goes on. Idempotent."""

    @abstractmethod
    async def close(self) -> None:
        """Send what is queued, end the stream and give everything back. Idempotent; raises no ConnectionLost.

        What the peer sent and nobody read is discarded. Waits as long as the peer takes to accept the queue,
        so give it a deadline where the peer may hang; cancelling it aborts the connection.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection at once with everything queued. Idempotent.

        The peer learns ConnectionLost; over unix sockets, which have no reset, it may see the end of the
        stream on reading and ConnectionLost only on writing.
        """


class Listener(ABC):
    """A place that accepts connections."""

    address: str
    """Where it listens, in the form `Network.connect` takes, with the real port."""

    @abstractmethod
    async def close(self) -> None:
        """Stop accepting; connections already accepted live on. Idempotent."""


Handler = Callable[[Connection], Awaitable[None]]
"""Serves one accepted connection.

The connection lives as long as the handler runs: when it returns, the connection is closed; when it raises,
aborted. Losing this very connection is an ordinary way to end; any other exception is reported to the event
loop's exception handler.
"""


class Network(ABC):
    """Where connections come from. Its OSErrors name the address and the cause."""

    @abstractmethod
    async def listen(self, address: str, handler: Handler, *, plain: bool = False) -> Listener:
        """Accept connections at `address`, one `handler` task for each.

        `plain` connections are not encrypted even in a network that encrypts, and no peer is verified: they
        are for bulk bytes, whose reader shows a secret that it was told over an encrypted one.

        Raises OSError when the address cannot be had (in use, not of this host), ValueError when it is not an
        address.
        """

    @abstractmethod
    async def connect(self, address: str, *, timeout_s: float, plain: bool = False) -> Connection:
        """Open a connection within `timeout_s` seconds, `plain` as the listener there has it.

        Raises ConnectFailed; ValueError for no address.
        """


def split_host_port(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`; raises ValueError that says what is wrong with it."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"address {address!r}: write an IPv6 address in brackets, like [::1]:8000")
    if not colon or not host:
        raise ValueError(f"address {address!r}: expected HOST:PORT, [IPV6]:PORT or unix:/PATH")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"address {address!r}: the port must be a number from 0 to 65535")
    return host, int(port)


def join_host_port(host: str, port: int) -> str:
    """The text form of a host and port; IPv6 hosts get brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
