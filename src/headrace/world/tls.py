"""TLS between a socket and a connection, with which a stream still ends on each side on its own.

In: a socket transport's callbacks, and an `ssl.SSLContext`. Out: to the connection's protocol, a transport
that behaves as the socket's own does. It must not know who listens, what certificates there are, or what the
bytes mean.

Event loops have TLS transports of their own. They are not used because their streams end on both sides at
once: what the peer still sends is lost, and it may even cost what this side had queued. TLS 1.3 itself has a
close_notify for each direction (RFC 8446, section 6.1), which this layer hands on as what it is.

    HANDSHAKE ──verified──▶ OPEN ──not TLS, broken off──▶ BROKEN
        └──not TLS, not of the cluster, too slow──▶ REFUSED

The connection's protocol hears of its transport in OPEN and not before; so nothing is served to a peer that
is not verified. Bytes are encrypted when they are written and decrypted when they come: all that waits is in
the socket's transport, whose flow control serves the connection directly.

A refused client learns of it when it reads: in TLS 1.3 its own handshake is complete before the server has
looked at its certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
from collections.abc import Callable
from typing import Any, cast

NODE_NAME = "headrace"
"""The DNS name that the certificate of every process of a cluster carries, whatever its host."""

HANDSHAKE_S = 10.0
"""How long a peer may take to show who it is."""

FAREWELL_S = 1.0
"""How long a refused client is read from, into nothing, so that no reset overtakes the refusal."""

_READ_BYTES = 256 * 1024
_UNKNOWN_ISSUER = {18, 19, 20, 21}
"""OpenSSL's numbers (X509_V_ERR) for certificates that no trusted authority signed."""


class TlsError(ConnectionError):
    """The peer is not what it must be, or broke off; the text says which."""


class _State(enum.Enum):
    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    BROKEN = enum.auto()
    REFUSED = enum.auto()


class Strangers:
    """Peers that have dialled in and have not shown who they are, and those that could not and are not gone.

    They are bounded, since each takes a file descriptor, and anybody can be one. Beyond, the one that had the
    longest time for it goes: who has a certificate shows it at once, and dials again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._here: dict[TlsTransport, None] = {}  # in the order in which they came

    def came(self, peer: TlsTransport) -> None:
        if len(self._here) >= self._most:
            longest = next(iter(self._here))
            del self._here[longest]
            longest.turn_away(f"{self._most} others wait to show who they are")
        self._here[peer] = None

    def left(self, peer: TlsTransport) -> None:
        self._here.pop(peer, None)


class TlsTransport(asyncio.Protocol, asyncio.Transport):
    """The protocol of a socket's transport, and the transport of a connection's protocol."""

    def __init__(
        self,
        context: ssl.SSLContext,
        protocol: asyncio.Protocol,
        *,
        server_side: bool,
        strangers: Strangers | None = None,
    ) -> None:
        """With `strangers` it is one of them until it is verified or gone."""
        super().__init__()
        self.protocol = protocol
        self.verified: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the handshake; fails with TlsError, or with the OSError that prevented it."""
        self._server_side = server_side
        self._strangers = strangers
        self._state = _State.HANDSHAKE
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side, None if server_side else NODE_NAME
        )
        self._error: TlsError | None = None
        self._input_ended = False
        self._output_ended = False
        self._timer: asyncio.TimerHandle | None = None

    # What the socket's transport tells us.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)
        if self._strangers is not None:
            self._strangers.came(self)
        self._set_timer(HANDSHAKE_S, self._too_slow)
        self._shake_hands()

    def data_received(self, data: bytes) -> None:
        if self._state in (_State.BROKEN, _State.REFUSED) or self._input_ended:
            return
        self._incoming.write(data)
        if self._state is _State.HANDSHAKE:
            self._shake_hands()
        if self._state is _State.OPEN:
            self._read()

    def eof_received(self) -> bool:
        if self._state is _State.HANDSHAKE:
            self._fail("it ended the connection during the TLS handshake")
        elif self._state is _State.OPEN and not self._input_ended:
            self._fail("its stream broke off without TLS's goodbye")
        if self._state is _State.REFUSED:
            self._socket.close()
        return True  # our own stream stays open until we end it

    def pause_writing(self) -> None:
        if self._state is _State.OPEN:
            self.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._state is _State.OPEN:
            self.protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        if self._strangers is not None:
            self._strangers.left(self)
        if self._state in (_State.OPEN, _State.BROKEN):
            self.protocol.connection_lost(self._error or exc)
        elif not self.verified.done():
            self._conclude(exc or TlsError("the connection was closed during the TLS handshake"))

    # The handshake.

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._fail(_describe(error))
        else:
            self._flush()
            self._verify_name()

    def _verify_name(self) -> None:
        """See to the name on both sides, though OpenSSL has asked a server for it: it asks no client."""
        certificate = self._tls.getpeercert() or {}
        if ("DNS", NODE_NAME) not in cast(tuple[object, ...], certificate.get("subjectAltName", ())):
            self._fail(f"its certificate does not carry the name {NODE_NAME}")
            return
        self._set_timer(None)
        if self._strangers is not None:
            self._strangers.left(self)
        self._state = _State.OPEN
        self.protocol.connection_made(self)
        self._conclude(None)

    def _too_slow(self) -> None:
        self._fail(f"no TLS handshake within {HANDSHAKE_S:g} s")

    def turn_away(self, reason: str) -> None:
        """Wait no longer for a peer to show who it is. Not for one that is verified."""
        if self._state is _State.HANDSHAKE:
            self._error = TlsError(reason)
            self._state = _State.REFUSED
            self._conclude(self._error)
        self._set_timer(None)
        self._socket.abort()

    def _conclude(self, error: Exception | None) -> None:
        if self.verified.cancelled():
            return
        if error is None:
            self.verified.set_result(None)
        else:
            self.verified.set_exception(error)
            self.verified.exception()  # seen: for a connection that was accepted, nobody waits

    def _fail(self, reason: str) -> None:
        self._error = TlsError(reason)
        self._flush()  # TLS may have told the peer why
        if self._state is _State.HANDSHAKE:
            self._state = _State.REFUSED
            self._conclude(self._error)
        else:
            self._state = _State.BROKEN
        if self._state is _State.REFUSED and self._server_side:
            self._set_timer(FAREWELL_S, self._socket.abort)
            self._end_socket()
        else:
            self._set_timer(None)
            self._socket.abort()

    def _set_timer(self, delay_s: float | None, then: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if delay_s is not None and then is not None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, then)

    # Bytes.

    def _read(self) -> None:
        try:
            while data := self._tls.read(_READ_BYTES):
                self.protocol.data_received(data)
        except ssl.SSLWantReadError:
            self._flush()  # an answer to a change of keys
            return
        except ssl.SSLZeroReturnError:
            pass  # what b"" says, once our own stream has ended
        except ssl.SSLError as error:
            self._fail(_describe(error))
            return
        self._input_ended = True
        self.protocol.eof_received()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.write(self._outgoing.read())

    # What the connection asks for.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._state is not _State.OPEN:
            return  # the protocol is about to learn of it
        with memoryview(data).cast("B") as view:
            sent = 0
            while sent < len(view):
                sent += self._tls.write(view[sent:])  # a record at a time
        self._flush()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self._state is not _State.OPEN or self._output_ended:
            return
        self._output_ended = True
        with contextlib.suppress(ssl.SSLError):  # having said its goodbye, it would wait for the peer's
            self._tls.unwrap()
        self._flush()
        self._end_socket()

    def _end_socket(self) -> None:
        # A socket that was reset cannot be shut down; its transport is about to report the reset itself.
        with contextlib.suppress(OSError):
            self._socket.write_eof()

    def close(self) -> None:
        self.write_eof()
        self._socket.close()

    def abort(self) -> None:
        self._socket.abort()

    def is_closing(self) -> bool:
        return self._socket.is_closing()

    def is_reading(self) -> bool:
        return self._socket.is_reading()

    def pause_reading(self) -> None:
        self._socket.pause_reading()

    def resume_reading(self) -> None:
        self._socket.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._socket.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._socket.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket.get_extra_info(name, default)


def _describe(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _UNKNOWN_ISSUER:
            return f"its certificate is not of this cluster's authority ({error.verify_message})"
        return f"its certificate is refused: {error.verify_message.rstrip('.')}"
    reason = (error.reason or "no reason given").lower().replace("_", " ")
    _, alert, words = reason.partition("alert ")
    if alert:
        return f"it refuses this side: {words}"
    return f"what it sends is not TLS 1.3 ({reason})"
