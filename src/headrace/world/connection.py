"""A `Connection` over any asyncio transport: the one implementation that real and simulated networks share.

In: a transport's callbacks (`asyncio.Protocol`). Out: `Connection`. It must not know whether the transport is
a socket or a simulation; what differs between those (how bytes travel, how a reset is made) stays in them.

States; the first to leave OPEN decides, and nothing comes after:

    OPEN ──close() or abort() here──▶ CLOSED_HERE
      └──reset, broken path─────────▶ LOST

The end of the peer's stream and the end of our own are independent of these, and of each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable
from typing import cast

from headrace.world.network import Connection, ConnectionLost, Handler

READ_BUFFER_BYTES = 256 * 1024
"""Received and unread bytes above which the transport is told to stop reading."""

WRITE_BUFFER_BYTES = 256 * 1024
"""Unsent bytes above which `drain` waits."""

LINGER_S = 1.0
"""How long `close` waits for the peer to end its stream too.

A socket that is closed while the peer still sends is reset by the kernel, and a reset may overtake what was
sent last; so `close` ends its own stream first and goes on reading, into nothing, for this long.
"""


class _State(enum.Enum):
    OPEN = enum.auto()
    CLOSED_HERE = enum.auto()
    LOST = enum.auto()


class TransportConnection(asyncio.Protocol, Connection):
    """One byte stream; see `Connection` for the contract."""

    def __init__(self, peer: str = "", on_open: Callable[[TransportConnection], None] | None = None) -> None:
        """`on_open` is called once the transport is there, before any byte arrives."""
        self.peer = peer
        self._on_open = on_open
        self._state = _State.OPEN
        self._reason = "it was never opened"
        self._received = bytearray()
        self._read_limit = READ_BUFFER_BYTES
        self._reading_paused = False
        self._input_ended = False
        self._output_ended = False
        self._writing_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []

    # What the transport tells us.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._input_closed = asyncio.Event()
        self._gone = asyncio.Event()
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        if self._state is not _State.OPEN:
            return
        self._received += data
        if len(self._received) >= self._read_limit and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._input_ended = True
        self._input_closed.set()
        self._wake_reader()
        return True  # our own stream stays open until we end it

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake_writers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state is _State.OPEN:
            self._state = _State.LOST
            self._reason = (str(exc) or type(exc).__name__) if exc is not None else "it was closed"
        self._input_closed.set()
        self._gone.set()
        self._wake_reader()
        self._wake_writers()

    # Reading.

    async def read(self, max_bytes: int) -> bytes:
        if max_bytes < 1:
            raise ValueError(f"read of {max_bytes} bytes from {self.peer}: ask for at least 1")
        while not self._received:
            if self._end_of_input():
                return b""
            await self._more_input()
        return self._take(min(max_bytes, len(self._received)))

    async def read_exactly(self, n: int) -> bytes:
        if n < 0:
            raise ValueError(f"read of {n} bytes from {self.peer}: the number cannot be negative")
        while len(self._received) < n:
            if self._end_of_input():
                raise asyncio.IncompleteReadError(self._take(len(self._received)), n)
            self._read_limit = max(READ_BUFFER_BYTES, n)
            try:
                self._resume_reading()
                await self._more_input()
            finally:
                self._read_limit = READ_BUFFER_BYTES
        return self._take(n)

    def _end_of_input(self) -> bool:
        """Whether the peer has ended its stream; raises when nothing more can come for another reason."""
        if self._state is _State.CLOSED_HERE or (self._state is _State.LOST and not self._input_ended):
            raise self._loss()
        return self._input_ended

    async def _more_input(self) -> None:
        if self._reader is not None:
            raise RuntimeError(f"two tasks read from the connection with {self.peer} at once")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _take(self, n: int) -> bytes:
        with memoryview(self._received) as view:
            data = bytes(view[:n])
        del self._received[:n]
        if len(self._received) < self._read_limit // 2:
            self._resume_reading()
        return data

    def _resume_reading(self) -> None:
        if self._reading_paused and len(self._received) < self._read_limit:
            self._reading_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # Writing.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._check_writable()
        if self._output_ended:
            raise RuntimeError(f"write to {self.peer} after write_eof")
        # Transports may keep a reference to what they could not send yet, so mutable memory is copied.
        self.transport.write(data if isinstance(data, bytes) else bytes(data))

    async def drain(self) -> None:
        self._check_writable()
        while self._writing_paused:
            await self._more_room()
            self._check_writable()

    def write_eof(self) -> None:
        self._check_writable()
        self._end_output()

    def _end_output(self) -> None:
        if not self._output_ended:
            self._output_ended = True
            # A socket that was reset cannot be shut down; the transport is about to report the reset itself.
            with contextlib.suppress(OSError):
                self.transport.write_eof()

    def _check_writable(self) -> None:
        if self._state is not _State.OPEN:
            raise self._loss()
        if self.transport.is_closing():  # it has failed, and is about to say so
            raise ConnectionLost(self.peer, "the connection broke while sending")

    async def _more_room(self) -> None:
        writer = asyncio.get_running_loop().create_future()
        self._writers.append(writer)
        try:
            await writer
        finally:
            self._writers.remove(writer)

    def _wake_writers(self) -> None:
        for writer in self._writers:
            if not writer.done():
                writer.set_result(None)

    # Ending.

    async def close(self) -> None:
        if self._state is _State.OPEN:
            self._leave("it was closed on this side")
            try:
                if not self.transport.is_closing():
                    await self._end_streams()
                    self.transport.close()
            except asyncio.CancelledError:
                self.abort()
                raise
        await self._gone.wait()

    async def _end_streams(self) -> None:
        """Send what is queued, end our stream, and give the peer a moment to end its own."""
        self._end_output()
        self.transport.set_write_buffer_limits(
            high=0
        )  # from here "writing is paused" means "not all is sent"
        while self._writing_paused and not self._gone.is_set():
            await self._more_room()
        try:
            async with asyncio.timeout(LINGER_S):
                await self._input_closed.wait()
        except TimeoutError:
            return  # the peer holds on or goes on sending; what it sends from now on meets a reset

    def abort(self) -> None:
        if not self._gone.is_set():
            self._leave("it was aborted on this side")
            self.transport.abort()

    def _leave(self, reason: str) -> None:
        """Stop being open by our own decision: unread input is dropped, and waiting tasks are told."""
        if self._state is _State.OPEN:
            self._state = _State.CLOSED_HERE
            self._reason = reason
        self._received.clear()
        self._resume_reading()
        self._wake_reader()
        self._wake_writers()

    def _loss(self) -> ConnectionLost:
        return ConnectionLost(self.peer, self._reason)


class HandlerTasks:
    """Runs a listener's handler for every connection it accepts; see `Handler` for what its end means."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._tasks: dict[asyncio.Task[None], None] = {}  # the event loop itself holds tasks only weakly

    def accept(self, connection: TransportConnection) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def _serve(self, connection: TransportConnection) -> None:
        try:
            await self._handler(connection)
        except ConnectionLost as loss:
            connection.abort()
            if loss.peer != connection.peer:
                self._report(loss, connection)
        except asyncio.CancelledError:
            connection.abort()
            raise
        except Exception as error:  # ends here: the connection is aborted and the error reported
            connection.abort()
            self._report(error, connection)
        else:
            await connection.close()

    @staticmethod
    def _report(error: Exception, connection: TransportConnection) -> None:
        message = f"the handler of the connection with {connection.peer} failed"
        asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
