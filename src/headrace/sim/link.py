"""Links between simulated machines: latency, seeded jitter, shared bandwidth, and being blocked.

In: packets, as callbacks to run at the other end. Out: their arrival in virtual time. It must not know what a
packet is part of (`sim/transport.py`), nor why a link is blocked (`sim/network.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from headrace.sim.loop import VirtualLoop


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


DATACENTRE = LinkProfile()
LOOPBACK = LinkProfile(latency_s=10e-6, jitter_s=5e-6, bytes_per_s=5e9)


@dataclass
class Machine:
    """What a link needs to know of the machine at its end."""

    name: str
    silent: bool = False
    """Switched off or unplugged: it neither receives nor answers."""


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
        self.bytes_until_break: int | None = None
        """After this many more bytes of payload, the connection that carries them breaks."""
        self.bytes_until_corruption: int | None = None
        """After this many more bytes of payload, one byte arrives inverted."""
        self._loop = loop
        self._free_at = 0.0
        self._held: list[Callable[[], None]] = []

    def send(self, size: int, arrive: Callable[[], None], *, retransmitted: bool = True) -> float:
        """Carry a packet of `size` bytes and call `arrive` at the other end; returns when it has left.

        If it cannot arrive, it is kept for `release` where TCP would retransmit it, and dropped otherwise.
        """
        if self.source.silent:
            return self._loop.time()
        left = max(self._free_at, self._loop.time()) + size / self.profile.bytes_per_s
        self._free_at = left
        delay = self.profile.latency_s + self.profile.jitter_s * self.chance.random()
        self._loop.call_at(left + delay, self._arrive, arrive, retransmitted)
        return left

    def _arrive(self, arrive: Callable[[], None], retransmitted: bool) -> None:
        if not self.blocked and not self.target.silent:
            arrive()
        elif retransmitted:
            self._held.append(arrive)

    def release(self) -> None:
        """Send again what was held, in order."""
        held, self._held = self._held, []
        for arrive in held:
            self.send(0, arrive)

    def forget(self) -> None:
        """Drop what was held: its sender will never repeat it."""
        self._held.clear()
