"""The network of a planning simulation: cheap messages, and bulk bytes that take time and are not there.

In: what programs write. Out: the same bytes, whole and in order, a latency later. The network of proof
(`sim/transport.py`) cuts streams into segments that are acknowledged, lost and repeated, and costs more than
all else of a step; here a write is one packet. Hosts, listeners, broken connections and crashes are the same.

A KV block is one byte of memory here. A transfer of blocks takes what their modelled bytes take on adapters
that are shared (`sim/flows.py`); then the one byte of each goes the way of a message.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from headrace.sim.connection import SimConnection
from headrace.sim.flows import Adapters
from headrace.sim.link import LinkProfile
from headrace.sim.network import Wiring
from headrace.sim.transport import Pipe, Segment, SimTransport
from headrace.world.connection import TransportConnection

CONTROL = LinkProfile(latency_s=100e-6, jitter_s=0.0, bytes_per_s=1.25e9)
"""For messages between hosts: 10 Gbit/s beside the adapters that carry blocks."""

WITHIN = LinkProfile(latency_s=20e-6, jitter_s=0.0, bytes_per_s=5e9)
"""Between an engine and its supervisor."""


class WholePipe(Pipe):
    """One direction of a connection over links without jitter: what is written arrives as it was written."""

    def pump(self) -> None:
        if self.buffer:
            data = bytes(self.buffer)
            self.buffer.clear()
            self.transmit(Segment(data))
        if self.end_requested and not self.end_sent:
            self.end_sent = True
            self.transmit(Segment(ends=True))

    def transmit(self, segment: Segment) -> None:
        self.link.send(len(segment.data), lambda: self._arrive(segment))

    def _arrive(self, segment: Segment) -> None:
        receiver = self.receiver
        if receiver.closed:
            if segment.data or not receiver.ended_orderly:
                receiver.send_reset()
            return
        self.unread.append(segment)
        receiver.deliver()

    def next_unread(self) -> Segment:
        return self.unread.popleft()

    def note(self, name: str, segment: Segment) -> None:
        """What programs trace, and every jump of the clock, are enough to tell two runs apart."""

    def report(self) -> None:
        """Nobody waits for an acknowledgement."""


class PlannedConnection(SimConnection):
    """A connection whose bulk bytes take the time of what they stand for."""

    def __init__(
        self,
        peer: str,
        on_open: Callable[[TransportConnection], None] | None,
        adapters: Adapters,
        bytes_each: float,
    ) -> None:
        super().__init__(peer, on_open)
        self._adapters = adapters
        self._bytes_each = bytes_each

    async def _send(self, buffers: Sequence[memoryview]) -> list[int]:
        pieces = [bytes(buffer) for buffer in buffers]
        transport = self.transport
        if not isinstance(transport, SimTransport):
            raise TypeError(f"{type(transport).__name__} is no transport of a simulation")
        size = sum(map(len, pieces)) * self._bytes_each
        await self._adapters.carry(transport.here, transport.peer.here, size)
        transport.write(b"".join(pieces))
        return [zlib.crc32(piece) for piece in pieces]


def planned_wiring(adapters: Adapters, bytes_each: float) -> Wiring:
    """Connections of a planning simulation, where a byte of bulk stands for `bytes_each`."""

    def connection(peer: str, on_open: Callable[[TransportConnection], None] | None = None) -> SimConnection:
        return PlannedConnection(peer, on_open, adapters, bytes_each)

    return Wiring(WholePipe, connection)


__all__ = ["CONTROL", "WITHIN", "PlannedConnection", "WholePipe", "planned_wiring"]
