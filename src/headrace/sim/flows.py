"""Bulk transfers between hosts: how long they take while others share their network adapters.

In: so many bytes from one host to another. Out: when the last has arrived, in virtual time. It must not know
what the bytes are, and moves none: a thousand tokens may be gigabytes, and only their time is of interest.

Every host has one adapter, which sends and receives at full rate at once; what lies between hosts is taken
for wide enough. Transfers share by max-min fairness, as long flows of TCP, or of RDMA with fair queues, come
to do: none could be quicker without slowing one down that is no quicker than itself (D. Bertsekas, R.
Gallager, "Data Networks", 1992, section 6.5.2). Rates change only where a transfer begins or ends, so between
these nothing has to be computed.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from dataclasses import dataclass

from headrace.sim.loop import VirtualLoop

DONE_BYTES = 1e-3
"""What may be left of a transfer that is over, by rounding."""


@dataclass(slots=True, eq=False)
class _Flow:
    source: str
    target: str
    left: float
    """Bytes."""
    ended: asyncio.Future[None]
    rate: float = 0.0


class Adapters:
    """The network adapters of all hosts, and the transfers under way between them."""

    def __init__(self, loop: VirtualLoop, bytes_per_s: float) -> None:
        """`bytes_per_s` is what each adapter carries in each direction."""
        if not bytes_per_s > 0:
            raise ValueError(f"an adapter carries more than 0 bytes a second, got {bytes_per_s}")
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._flows: dict[_Flow, None] = {}
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.carried_bytes: defaultdict[str, float] = defaultdict(float)
        """By the host that sent them, transfers that were given up left out."""

    async def carry(self, source: str, target: str, size: float) -> None:
        """Take as long as `size` bytes take from `source` to `target`. Cancelled, the others go faster."""
        if size <= 0 or source == target:
            return
        self._settle()
        flow = _Flow(source, target, size, self._loop.create_future())
        self._flows[flow] = None
        self._share()
        try:
            await flow.ended
            self.carried_bytes[source] += size
        finally:
            if flow in self._flows:
                self._settle()
                del self._flows[flow]
                self._share()

    def _settle(self) -> None:
        """Count what was carried since rates last changed."""
        elapsed = self._loop.now - self._since
        self._since = self._loop.now
        for flow in self._flows:
            flow.left -= flow.rate * elapsed

    def _share(self) -> None:
        """Give every transfer its rate, and wait for the first that ends."""
        open_flows = list(self._flows)
        left: dict[tuple[str, bool], float] = {}
        users: dict[tuple[str, bool], int] = {}
        for flow in open_flows:
            for end in ((flow.source, True), (flow.target, False)):
                left[end] = self._bytes_per_s
                users[end] = users.get(end, 0) + 1
        while open_flows:  # the narrowest end is full; whoever is left shares what is left
            end = min(users, key=lambda e: left[e] / users[e] if users[e] else math.inf)
            share = left[end] / users[end]
            rest = []
            for flow in open_flows:
                ends = ((flow.source, True), (flow.target, False))
                if end not in ends:
                    rest.append(flow)
                    continue
                flow.rate = share
                for each in ends:
                    left[each] -= share
                    users[each] -= 1
            open_flows = rest
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flows:
            first_s = min(max(0.0, flow.left) / flow.rate for flow in self._flows)
            self._timer = self._loop.call_true(self._loop.now + first_s, self._end_some)

    def _end_some(self) -> None:
        self._timer = None
        self._settle()
        for flow in [flow for flow in self._flows if flow.left <= max(DONE_BYTES, flow.rate * 1e-12)]:
            del self._flows[flow]
            if not flow.ended.done():
                flow.ended.set_result(None)
        self._share()
