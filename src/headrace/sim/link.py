"""Links between simulated machines: latency, seeded jitter, shared bandwidth, and being blocked.

In: packets, as callbacks to run at the other end. Out: their arrival in virtual time. It must not know what a
packet is part of (`sim/transport.py`), nor why a link is blocked (`sim/network.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.sim.clock import HostClock
from headrace.sim.loop import VirtualLoop

SEGMENT_BYTES = 64 * 1024
SHORTEST_SEGMENT_BYTES = 64
SEGMENT_S = 0.01
"""On a narrow link bytes arrive little by little: what it carries in this time, within the two limits."""


@dataclass(frozen=True)
class LinkProfile:
    """What one direction between two hosts is like. Defaults: a 10 Gbit/s network within a data centre."""

    latency_s: float = 100e-6
    jitter_s: float = 50e-6
    """Each packet takes up to this much longer, evenly distributed."""
    bytes_per_s: float = 1.25e9

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.jitter_s < 0 or self.bytes_per_s <= 0:
            raise ValueError(f"{self}: latency and jitter must not be negative, bandwidth must be positive")

    @property
    def segment_bytes(self) -> int:
        """The most that one packet carries."""
        return max(SHORTEST_SEGMENT_BYTES, min(SEGMENT_BYTES, int(self.bytes_per_s * SEGMENT_S)))


DATACENTRE = LinkProfile()
LOOPBACK = LinkProfile(latency_s=10e-6, jitter_s=5e-6, bytes_per_s=5e9)


@dataclass
class Machine:
    """What a link needs to know of the machine at its end."""

    name: str
    silent: bool = False
    """Switched off or unplugged: it neither receives nor answers."""
    clock: HostClock = field(default_factory=HostClock)


@dataclass
class Armed:
    """What will happen to one byte of a link."""

    after_bytes: int
    """How many bytes of payload go before it."""
    acted: Callable[[], None]
    """Told when it happens."""


class Link:
    """One direction from one machine to another."""

    def __init__(
        self, loop: VirtualLoop, source: Machine, target: Machine, profile: LinkProfile, chance: random.Random
    ) -> None:
        self.source = source
        self.target = target
        self.profile = profile
        self.chance = chance
        self.blocked = False
        self.breaks: Armed | None = None
        """The connection that carries this byte breaks."""
        self.corrupts: Armed | None = None
        """This byte arrives inverted."""
        self.sent = 0
        """Packets that left."""
        self.stopped = 0
        """Packets that a blocked link, or a silent machine at its end, did not let arrive."""
        self._loop = loop
        self._free_at = 0.0
        self._held: list[Callable[[], None]] = []

    def send(self, size: int, arrive: Callable[[], None], *, retransmitted: bool = True) -> float:
        """Carry a packet of `size` bytes and call `arrive` at the other end; returns when it has left.

        `arrive` runs where the clock of that end is read; what is returned is true time.

        If it cannot arrive, it is kept for `release` where TCP would retransmit it, and dropped otherwise.
        """
        if self.source.silent:
            return self._loop.now
        self.sent += 1
        left = max(self._free_at, self._loop.now) + size / self.profile.bytes_per_s
        self._free_at = left
        profile = self.profile
        delay = profile.latency_s
        if profile.jitter_s:
            delay += profile.jitter_s * self.chance.random()
        context = self.target.clock.context
        self._loop.call_true(left + delay, self._arrive, arrive, retransmitted, context=context)
        return left

    def _arrive(self, arrive: Callable[[], None], retransmitted: bool) -> None:
        if not self.blocked and not self.target.silent:
            arrive()
            return
        self.stopped += 1
        if retransmitted:
            self._held.append(arrive)

    def release(self) -> None:
        """Send again what was held, in order."""
        held, self._held = self._held, []
        for arrive in held:
            self.send(0, arrive)

    def forget(self) -> None:
        """Drop what was held: its sender will never repeat it."""
        self._held.clear()
