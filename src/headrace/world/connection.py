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
from abc import abstractmethod
from collections.abc import Callable, Sequence
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
        self._bulk_writer: asyncio.Future[None] | None = None

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
        if len(self._received) >= self._read_limit:
            self._pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._end_input()
        self._wake_reader()
        return True  # our own stream stays open until we end it

    def _end_input(self) -> None:
        self._input_ended = True
        self._input_closed.set()

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
        self._wake_everyone()

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
            if self._reader is not None:
                raise self._two_readers()  # before the transport resumes: the other may be reading past it
            self._read_limit = max(READ_BUFFER_BYTES, n)
            try:
                self._resume_reading()
                await self._more_input()
            finally:
                self._read_limit = READ_BUFFER_BYTES
        return self._take(n)

    def take(self, n: int) -> bytes | None:
        return self._take(n) if len(self._received) >= n else None

    async def read_into(self, buffers: Sequence[memoryview]) -> list[int]:
        self._check_bulk()
        if self._reader is not None:
            raise self._two_readers()
        try:
            return await self._fill_buffers(buffers)
        except asyncio.CancelledError:
            self.abort()
            raise

    @abstractmethod
    async def _fill_buffers(self, buffers: Sequence[memoryview]) -> list[int]:
        """Do what `read_into` says, but for cancellation; whoever waits here is the waiting reader."""

    def _check_bulk(self) -> None:
        """Raise RuntimeError if this connection carries no bulk bytes."""

    def _end_of_input(self) -> bool:
        """Whether the peer has ended its stream; raises when nothing more can come for another reason."""
        if self._state is _State.CLOSED_HERE or (self._state is _State.LOST and not self._input_ended):
            raise self._loss()
        return self._input_ended

    async def _more_input(self) -> None:
        if self._reader is not None:
            raise self._two_readers()
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _two_readers(self) -> RuntimeError:
        return RuntimeError(f"two tasks read from the connection with {self.peer} at once")

    def _take(self, n: int) -> bytes:
        if n == len(self._received):
            data, self._received = bytes(self._received), bytearray()
        else:
            with memoryview(self._received) as view:
                data = bytes(view[:n])
            del self._received[:n]
        if self._reading_paused and len(self._received) < self._read_limit // 2:
            self._resume_reading()
        return data

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            if not self.transport.is_closing():
                self.transport.pause_reading()

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
        self._check_output()
        # Transports may keep a reference to what they could not send yet, so mutable memory is copied.
        self.transport.write(data if isinstance(data, bytes) else bytes(data))

    async def drain(self) -> None:
        self._check_writable()
        while self._writing_paused:
            await self._more_room()
            self._check_writable()

    @property
    def is_behind(self) -> bool:
        return self._writing_paused

    async def write_from(self, buffers: Sequence[memoryview]) -> list[int]:
        self._check_bulk()
        self._check_output()
        # What is written from here on would be sent among the buffers, so it is refused meanwhile.
        self._bulk_writer = asyncio.get_running_loop().create_future()
        try:
            await self._all_sent()
            return await self._send_buffers(buffers, self._bulk_writer)
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._bulk_writer = None

    @abstractmethod
    async def _send_buffers(self, buffers: Sequence[memoryview], stop: asyncio.Future[None]) -> list[int]:
        """Do what `write_from` says; the transport's own queue is empty, and `stop` is done after a loss."""

    async def _all_sent(self) -> None:
        """Wait until the transport's queue is empty."""
        try:
            while True:
                self._check_writable()
                self.transport.set_write_buffer_limits(high=0)  # "writing is paused" means "not all is sent"
                if not self._writing_paused:
                    return
                await self._more_room()
        finally:
            if not self.transport.is_closing():
                self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def write_eof(self) -> None:
        self._check_writable()
        self._refuse_during_bulk()
        self._end_output()

    def _check_output(self) -> None:
        self._check_writable()
        if self._output_ended:
            raise RuntimeError(f"write to {self.peer} after write_eof")
        self._refuse_during_bulk()

    def _refuse_during_bulk(self) -> None:
        if self._bulk_writer is not None:
            raise RuntimeError(f"write to {self.peer} while write_from sends: await its end first")

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
        if self._bulk_writer is not None:
            self.abort()  # an orderly end in the middle of bulk bytes would look like all there was to send
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
        self._wake_everyone()

    def _lose(self, reason: str) -> None:
        """Bulk bytes met a loss that the transport has not told us of."""
        if self._state is _State.OPEN:
            self._state = _State.LOST
            self._reason = reason
            # The kernel tells of a reset once; to the transport, which asked second, it was the stream's end.
            self._input_ended = False
        self._wake_everyone()
        self.transport.abort()

    def _wake_everyone(self) -> None:
        self._wake_reader()
        self._wake_writers()
        if self._bulk_writer is not None and not self._bulk_writer.done():
            self._bulk_writer.set_result(None)

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
