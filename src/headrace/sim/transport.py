"""A simulated TCP: asyncio transports for the programs, and what their machines do for them.

In: bytes that a `TransportConnection` writes. Out: the same bytes in order at the other end, later; or a
loss, learnt the way TCP lets one learn it. It must not know listeners or fault scenarios (`sim/network.py`).

The model, and what each part of it is there to expose:

- a stream is cut into segments at seeded places, so nobody may rely on the sizes of writes;
- a segment is in flight until its acknowledgement has come back over the opposite link, and unread until the
  other program has taken it; both fill the window, and a full window is back-pressure;
- a blocked link holds segments and acknowledgements until it is healed, or until the sender has waited the
  retransmission time-out for one of them and gives up; the receiver of a lost sender learns nothing;
- a byte may arrive inverted, as from a bad link whose error TCP's 16-bit checksum missed;
- a reset is sent once and never again: on a blocked link it is lost. Whoever sends to a closed end is reset.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headrace.sim.link import SEGMENT_BYTES, Link
from headrace.sim.loop import VirtualLoop

CUT_PROBABILITY = 0.1
"""How often a segment ends at a random place instead of where the data or the window ends."""

QUIET_WITHIN_S = 0.03
"""A call that moves bytes of memory, on a thread of its own, looks so often whether it is to stop."""


@dataclass
class Segment:
    """A piece of a stream on its way. Opening and end count as one byte, as in TCP."""

    data: bytes = b""
    opens: bool = False
    ends: bool = False
    arrived: bool = field(default=False, init=False)

    @property
    def span(self) -> int:
        return len(self.data) or 1


@dataclass(frozen=True)
class WireLimits:
    """What every connection of a simulated network has in common."""

    window_bytes: int
    """Sent and not yet read by the receiving side: what the two kernels would buffer."""
    retransmission_timeout_s: float


class Pipe:
    """One direction of a connection: buffered, then in flight, then unread, then read.

    What the buffer has given up to the window belongs to the sending machine: it still arrives when the
    program has closed its end or was killed.
    """

    def __init__(self, loop: VirtualLoop, link: Link, back: Link, limits: WireLimits) -> None:
        """`link` carries the stream, `back` its acknowledgements; `connect_ends` sets sender and receiver."""
        self.link = link
        self.sender: SimTransport
        self.receiver: SimTransport
        self.buffer = bytearray()
        self.end_requested = self.end_sent = False
        self.unread: deque[Segment] = deque()
        self._loop = loop
        self._back = back
        self._limits = limits
        self._in_flight: deque[Segment] = deque()
        # All in bytes since the beginning: sent, received in order, read; and what the sender knows of these.
        self._sent = self._received = self._read = self._known_read = 0
        self._unacknowledged: deque[tuple[int, float]] = deque()  # where each segment ends, when it has left
        self._give_up_timer: asyncio.TimerHandle | None = None

    # The sending machine.

    def pump(self) -> None:
        """Send as much of the buffer as the window takes, then the end of the stream if it was asked for."""
        room = self._limits.window_bytes - (self._sent - self._known_read)
        while self.buffer and room > 0:
            size = min(len(self.buffer), room, self.link.profile.segment_bytes)
            if self.link.chance.random() < CUT_PROBABILITY:
                size = self.link.chance.randint(1, size)
            self.transmit(Segment(bytes(self.buffer[:size])))
            del self.buffer[:size]
            room -= size
        if not self.buffer and self.end_requested and not self.end_sent:
            self.end_sent = True
            self.transmit(Segment(ends=True))

    def transmit(self, segment: Segment) -> None:
        self._sent += segment.span
        self._in_flight.append(segment)
        left = self.link.send(len(segment.data), lambda: self._arrive(segment))
        self._unacknowledged.append((self._sent, left))
        if self._give_up_timer is None:
            self._give_up_timer = self._loop.call_true(self._give_up_at(), self._check_progress)

    def _acknowledge(self, received: int, read: int) -> None:
        while self._unacknowledged and self._unacknowledged[0][0] <= received:
            self._unacknowledged.popleft()
        self._known_read = max(self._known_read, read)
        if not self._unacknowledged:
            self._stop_timer()
        self.sender.on_window()

    def _give_up_at(self) -> float:
        _, left = self._unacknowledged[0]
        return left + self._limits.retransmission_timeout_s

    def _check_progress(self) -> None:
        self._give_up_timer = None
        if self._loop.now < self._give_up_at():
            self._give_up_timer = self._loop.call_true(self._give_up_at(), self._check_progress)
            return
        limit = self._limits.retransmission_timeout_s
        self.sender.fail(f"nothing sent was acknowledged for {limit:g} s")

    def _stop_timer(self) -> None:
        if self._give_up_timer is not None:
            self._give_up_timer.cancel()
            self._give_up_timer = None

    def stop(self) -> None:
        """Nothing more of this direction arrives, not even what was sent."""
        self.buffer.clear()
        self._in_flight.clear()
        self._unacknowledged.clear()
        self._stop_timer()

    # The receiving machine.

    def _arrive(self, segment: Segment) -> None:
        """A segment is here; hand on what is now complete and in order."""
        segment.arrived = True
        while self._in_flight and self._in_flight[0].arrived:
            first = self._in_flight.popleft()
            self._received += first.span
            if self.receiver.closed:
                if first.data or not self.receiver.ended_orderly:
                    self.receiver.send_reset()
                continue
            self._corrupt(first)
            breaks = self.link.breaks
            if breaks is not None and first.data:
                if len(first.data) >= breaks.after_bytes:
                    self.link.breaks = None
                    self.unread.append(Segment(first.data[: breaks.after_bytes]))
                    self.receiver.deliver()
                    break_connection(self.receiver)
                    breaks.acted()
                    return
                breaks.after_bytes -= len(first.data)
            self.unread.append(first)
        self.receiver.deliver()
        self.report()

    def _corrupt(self, segment: Segment) -> None:
        corrupts = self.link.corrupts
        if corrupts is None or not segment.data:
            return
        if corrupts.after_bytes < len(segment.data):
            data = bytearray(segment.data)
            data[corrupts.after_bytes] ^= 0xFF
            segment.data = bytes(data)
            self.link.corrupts = None
            corrupts.acted()
        else:
            corrupts.after_bytes -= len(segment.data)

    def next_unread(self) -> Segment:
        """Take the oldest unread segment; its room in the window is free once `report` has arrived."""
        segment = self.unread.popleft()
        self._read += segment.span
        return segment

    def note(self, name: str, segment: Segment) -> None:
        """Put into the run's trace that a program, whose end is called so, is given a segment."""
        self._loop.trace("arrive", name, len(segment.data), zlib.crc32(segment.data))

    def report(self) -> None:
        """Acknowledge what has been received and read so far."""
        received, read = self._received, self._read
        self._back.send(0, lambda: self._acknowledge(received, read))


class SimTransport(asyncio.Transport):
    """One end of a simulated connection: what the program on that machine has of it."""

    def __init__(
        self,
        loop: VirtualLoop,
        name: str,
        sending: Pipe,
        receiving: Pipe,
        on_closed: Callable[[SimTransport], None],
    ) -> None:
        """`name` stands in the trace."""
        super().__init__()
        self.name = name
        self.closed = False
        """The program has no part in it any more."""
        self.ended_orderly = False
        """It was closed after all that was written had gone out with an end."""
        self._loop = loop
        self._sending = sending
        self._receiving = receiving
        self._on_closed = on_closed
        self._protocol: asyncio.Protocol | None = None
        self._accept: Callable[[], asyncio.Protocol | None] | None = None
        self._closing = False
        self._reading_paused = self._writing_paused = False
        self._high = self._low = SEGMENT_BYTES

    @property
    def here(self) -> str:
        """The name of the machine this end is on."""
        return self._sending.link.source.name

    @property
    def peer(self) -> SimTransport:
        """The other end."""
        return self._sending.receiver

    def open(self, protocol: asyncio.Protocol) -> None:
        """Give this end to the program that connected, and complete the handshake."""
        self._attach(protocol)
        self._sending.transmit(Segment(opens=True))

    def expect(self, accept: Callable[[], asyncio.Protocol | None]) -> None:
        """When the handshake completes, ask `accept` for the program at this end; None refuses it."""
        self._accept = accept

    def _attach(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    # asyncio.Transport, as `TransportConnection` uses it.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`quiet_after_s`: how long a move of memory may go on here after it was told to stop, drawn anew."""
        return self._sending.link.chance.uniform(0, QUIET_WITHIN_S) if name == "quiet_after_s" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else SEGMENT_BYTES
        self._low = low if low is not None else self._high // 4
        self._steer_writer()

    def get_write_buffer_size(self) -> int:
        return len(self._sending.buffer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._sending.buffer += data
            self.on_window()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing:
            self._sending.end_requested = True
            self.on_window()

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            self._loop.call_soon(self._deliver_paused)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Send what is buffered, then end the stream and let go of it."""
        if not self._closing:
            self._closing = self._sending.end_requested = True
            self.on_window()

    def abort(self) -> None:
        """Let go at once and reset the other end."""
        if not self.closed:
            self.send_reset()
            self._let_go(None)

    # What happens to it.

    def on_window(self) -> None:
        """There may be room in the window, or something new to send."""
        if self.closed:
            return
        self._sending.pump()
        if self._closing and self._sending.end_sent:
            self.ended_orderly = True
            if any(segment.data for segment in self._receiving.unread):
                self.send_reset()  # as kernels do: the peer must not believe that this was read
            self._let_go(None)
        else:
            self._steer_writer()

    def _steer_writer(self) -> None:
        if self._protocol is None:
            return
        waiting = len(self._sending.buffer)
        if not self._writing_paused and waiting > self._high:
            self._writing_paused = True
            self._protocol.pause_writing()
        elif self._writing_paused and waiting <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    def deliver(self) -> None:
        """Hand what has arrived to the program, unless it does not want it now."""
        while self._receiving.unread and not self._reading_paused and not self._closing:
            segment = self._receiving.next_unread()
            self._receiving.note(self.name, segment)
            if segment.opens:
                protocol = self._accept() if self._accept is not None else None
                if protocol is None:
                    self.abort()
                else:
                    self._attach(protocol)
            elif self._protocol is not None:
                if not segment.ends:
                    self._protocol.data_received(segment.data)
                elif not self._protocol.eof_received():
                    self.close()

    def _deliver_paused(self) -> None:
        if self._receiving.unread and not self.closed:
            self.deliver()
            self._receiving.report()

    def send_reset(self) -> None:
        """Tell the other end, once, that this one is gone."""
        self._sending.link.send(0, lambda: self.peer.fail("it was reset by the peer"), retransmitted=False)

    def fail(self, reason: str) -> None:
        """The connection is gone, and not by this side's wish."""
        self._sending.stop()
        if not self.closed:
            self._loop.trace("lost", self.name, reason)
            self._let_go(ConnectionResetError(reason))

    def orphan(self, reason: str) -> None:
        """The program is dead, its machine is not: what was sent arrives, then an ordinary end."""
        if not self.closed:
            self._sending.buffer.clear()
            self._sending.end_requested = True
            self._sending.pump()
            self.ended_orderly = True
            self._let_go(ConnectionResetError(reason))

    def _let_go(self, exc: Exception | None) -> None:
        self.closed = self._closing = True
        self._receiving.unread.clear()
        if not self.ended_orderly:
            self._sending.stop()
        if self._protocol is not None:
            context = self._sending.link.source.clock.context
            self._loop.call_soon(self._protocol.connection_lost, exc, context=context)
        self._on_closed(self)


def connect_ends(
    loop: VirtualLoop,
    limits: WireLimits,
    there: Link,
    back: Link,
    on_closed: Callable[[SimTransport], None],
    pipe: type[Pipe] = Pipe,
) -> tuple[SimTransport, SimTransport]:
    """Make the two ends of a connection: the caller's, which sends over `there`, and the other's."""
    out, home = pipe(loop, there, back, limits), pipe(loop, back, there, limits)
    name = f"{there.source.name}->{there.target.name}"
    caller = SimTransport(loop, f"{name} caller", out, home, on_closed)
    called = SimTransport(loop, f"{name} called", home, out, on_closed)
    out.sender = home.receiver = caller
    out.receiver = home.sender = called
    return caller, called


def break_connection(end: SimTransport) -> None:
    """Something on the way resets both ends; what is in flight is gone."""
    other = end.peer
    end.fail("it was broken on the way")
    other.fail("it was broken on the way")
