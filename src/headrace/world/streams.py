"""The real network: TCP and unix sockets through asyncio, on asyncio's own loop and on uvloop alike.

In: addresses as text, and the cluster's credentials. Out: `TransportConnection`s over socket transports.
With credentials, TCP connections are mutual TLS (`world/tls.py`), which `StreamNetwork` puts between the
socket and the connection; no other code sees whether a connection is encrypted. Unix sockets are their
owner's, and stay plain.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headrace import _native
from headrace.world import bulk
from headrace.world.connection import HandlerTasks, TransportConnection
from headrace.world.machine import most_files
from headrace.world.network import (
    UNIX_PREFIX,
    ConnectFailed,
    Connection,
    Handler,
    Listener,
    Network,
    join_host_port,
    split_host_port,
)
from headrace.world.tls import Strangers, TlsTransport

if TYPE_CHECKING:
    from headrace.world.credentials import Credentials

ACCEPT_BACKLOG = 1024
"""Connections the kernel completes before they are accepted; its own limit (somaxconn) may be lower."""

MAX_STRANGERS = 1000
STRANGERS_SHARE = 0.25
"""So many peers at once may be on their way to show who they are, or this share of the file descriptors."""

REFUSALS_KNOWN = 1000
"""Of so many peers and reasons it is remembered that their refusal was reported."""

BACKLOG_RETRY_S = 0.01
"""How long to wait before trying a unix socket again whose listener is behind with accepting."""


class StreamNetwork(Network):
    """Sockets of this machine."""

    def __init__(
        self, credentials: Credentials | None = None, report: Callable[[str], None] = lambda line: None
    ) -> None:
        """Without `credentials` every connection is plain. Raises CredentialsError.

        `report` gets a line for people when a peer is not let in: for each host and reason once.
        """
        self._server_tls = credentials.server_context() if credentials is not None else None
        self._client_tls = credentials.client_context() if credentials is not None else None
        self._report = report
        self._strangers = Strangers(int(min(MAX_STRANGERS, most_files() * STRANGERS_SHARE)))
        self._refusals: set[tuple[str, str]] = set()

    async def listen(self, address: str, handler: Handler, *, plain: bool = False) -> Listener:
        if address.startswith(UNIX_PREFIX):
            path = _unix_path(address)
            bound = _bind_unix(path)
            peer = f"{address} (client)"
        else:
            path = None
            bound = await _bind_tcp(address)
            address = join_host_port(*bound.getsockname()[:2])
            peer = ""
        tasks = HandlerTasks(handler)
        connections = _connections(peer, on_open=tasks.accept)
        tls = None if plain else self._server_tls
        loop = asyncio.get_running_loop()
        try:
            if path is not None:
                server = await loop.create_unix_server(connections, sock=bound, backlog=ACCEPT_BACKLOG)
            elif tls is None:
                server = await loop.create_server(connections, sock=bound, backlog=ACCEPT_BACKLOG)
            else:
                server = await loop.create_server(
                    lambda: self._asked_who_it_is(
                        TlsTransport(tls, connections(), server_side=True, strangers=self._strangers)
                    ),
                    sock=bound,
                    backlog=ACCEPT_BACKLOG,
                )
        except BaseException:
            bound.close()
            raise
        return _StreamListener(address, server, path)

    def _asked_who_it_is(self, accepted: TlsTransport) -> TlsTransport:
        def tell(verified: asyncio.Future[None]) -> None:
            if verified.cancelled() or (error := verified.exception()) is None:
                return
            peername = accepted.get_extra_info("peername")
            refusal = (peername[0] if peername else "a peer that has left", str(error))
            if refusal not in self._refusals and len(self._refusals) < REFUSALS_KNOWN:
                self._refusals.add(refusal)
                self._report(f"a connection from {refusal[0]} was refused: {refusal[1]}")

        accepted.verified.add_done_callback(tell)
        return accepted

    async def connect(self, address: str, *, timeout_s: float, plain: bool = False) -> Connection:
        loop = asyncio.get_running_loop()
        connections = _connections(address)
        tls = None if plain else self._client_tls
        awaited = "answer"
        try:
            async with asyncio.timeout(timeout_s):
                if address.startswith(UNIX_PREFIX):
                    sock = await _connect_unix(_unix_path(address))
                    _, connection = await loop.create_unix_connection(connections, sock=sock)
                    return connection
                host, port = split_host_port(address)
                if tls is None:
                    _, connection = await loop.create_connection(connections, host, port)
                    return connection
                connection = connections()
                encrypted = TlsTransport(tls, connection, server_side=False)
                await loop.create_connection(lambda: encrypted, host, port)
                awaited = "TLS handshake"
                try:
                    await encrypted.verified
                except BaseException:
                    encrypted.abort()
                    raise
                return connection
        except TimeoutError as error:
            reason = _describe(error) if error.errno else f"no {awaited} within {timeout_s:g} s"
            raise ConnectFailed(address, reason) from error
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise ConnectFailed(address, "nothing listens there") from error
        except OSError as error:
            raise ConnectFailed(address, _describe(error)) from error


class _SocketConnection(TransportConnection):
    """A connection over a socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self.peer:
            peername = transport.get_extra_info("peername")
            self.peer = join_host_port(*peername[:2]) if peername else "a peer that has left"
        super().connection_made(transport)

    def abort(self) -> None:
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX and not self.transport.is_closing():
            # Without this the kernel ends a discarded stream as if it were complete.
            with contextlib.suppress(OSError):  # the socket is gone: nothing left to reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        super().abort()

    # Bulk bytes go past the transport.

    def _check_bulk(self) -> None:
        if isinstance(self.transport, TlsTransport):
            raise RuntimeError(f"bulk bytes over TLS with {self.peer}: listen and connect with plain=True")

    async def _send_buffers(self, buffers: Sequence[memoryview], stop: asyncio.Future[None]) -> list[int]:
        pinned = _native.Bulk(buffers, False)
        try:
            await self._move(pinned, stop, sending=True)
        finally:
            checksums = pinned.finish()
        return checksums

    async def _fill_buffers(self, buffers: Sequence[memoryview]) -> list[int]:
        total = sum(buffer.nbytes for buffer in buffers)
        pinned = _native.Bulk(buffers, True)
        self._reader = asyncio.get_running_loop().create_future()
        try:
            self._pause_reading()
            early = pinned.fill(bytes(self._received))
            del self._received[:early]
            if early < total and (
                self._end_of_input()
                or await self._move(pinned, self._reader, sending=False) == _native.BULK_ENDED
            ):
                self._end_input()
                raise asyncio.IncompleteReadError(b"", total)
        finally:
            checksums = pinned.finish()
            self._reader = None
            self._resume_reading()
        return checksums

    async def _move(self, pinned: _native.Bulk, stop: asyncio.Future[None], *, sending: bool) -> int:
        """Returns DONE or ENDED; everything else is a loss."""
        sock = self.transport.get_extra_info("socket")
        try:
            status = await bulk.move(sock, pinned, sending=sending, stop=stop)
        except OSError as error:
            status = -(error.errno or errno.EIO)
        if status in (_native.BULK_DONE, _native.BULK_ENDED):
            return status
        self._lose(os.strerror(-status).lower() if status < 0 else "it was given up")
        raise self._loss()


def _connections(
    peer: str, on_open: Callable[[TransportConnection], None] | None = None
) -> Callable[[], _SocketConnection]:
    return lambda: _SocketConnection(peer, on_open)


class _StreamListener(Listener):
    def __init__(self, address: str, server: asyncio.AbstractServer, path: str | None) -> None:
        self.address = address
        self._server = server
        self._path = path
        self._inode = os.stat(path).st_ino if path is not None else None

    async def close(self) -> None:
        self._server.close()
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == self._inode:  # somebody else's socket may have taken the name
                    os.unlink(path)
        await asyncio.sleep(0)  # uvloop closes the listening socket in its next turn


async def _bind_tcp(address: str) -> socket.socket:
    host, port = split_host_port(address)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _listen_error(address, error) from error
    family, kind, protocol, _, where = found[0]  # one address, so that port 0 becomes one port
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
    except OSError as error:
        sock.close()
        raise _listen_error(address, error) from error
    return sock


def _bind_unix(path: str) -> socket.socket:
    """Bind a socket only its owner may connect to; nobody can before it listens, which is later."""
    _remove_abandoned(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        sock.close()
        raise _listen_error(UNIX_PREFIX + path, error) from error
    return sock


async def _connect_unix(path: str) -> socket.socket:
    """Connect, waiting while the listener's backlog is full.

    A non-blocking connect then fails with EAGAIN and starts nothing. asyncio takes that for a connection that
    is coming about, and then for one that did; uvloop gives up at once.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                await asyncio.sleep(BACKLOG_RETRY_S)
    except BaseException:
        sock.close()
        raise


def _remove_abandoned(path: str) -> None:
    """Remove a socket file whose process has died; one that is listened on, or no socket at all, stays."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return  # nothing there, or not ours to look at: bind will say what is wrong
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _unix_path(address: str) -> str:
    path = address.removeprefix(UNIX_PREFIX)
    if not path or len(os.fsencode(path)) > 107:  # sockaddr_un holds 108 bytes with the terminator
        raise ValueError(f"address {address!r}: a unix socket's path has 1 to 107 bytes")
    return path


def _listen_error(address: str, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot listen at {address}: {_describe(error)}")


def _describe(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    if error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
