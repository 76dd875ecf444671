"""Clocks of simulated hosts: each counts from a beginning of its own, at a rate of its own, and may be set.

In: the true time of the run, which no program on a host sees. Out: what a host's clock says then, and when it
will say something. It must not know what a host is: whatever runs in a clock's `context` reads that clock,
and so do the tasks, timers and callbacks that it makes. Where no clock is set, time is the true one.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar

CURRENT: ContextVar[HostClock | None] = ContextVar("the clock that is read here", default=None)


class HostClock:
    """One monotonic clock. All times in seconds."""

    def __init__(self) -> None:
        """A clock that is right, until it is set."""
        self._true_s = self._local_s = 0.0  # what it said when it was last set
        self._rate = 1.0
        self.context = Context()
        """Where this clock is read; not to be entered by hand, as loops run callbacks in it."""
        self.context.run(CURRENT.set, self)

    def read(self, true_s: float) -> float:
        """What it says at a true time."""
        return self._local_s + (true_s - self._true_s) * self._rate

    def due(self, local_s: float) -> float:
        """The earliest true time at which it says `local_s` or more, as far as it is set now."""
        true_s = self._true_s + (local_s - self._local_s) / self._rate
        while self.read(true_s) < local_s:  # by rounding; who waits must not wake too early
            true_s = math.nextafter(true_s, math.inf)
        return true_s

    def set(self, true_s: float, *, ahead_s: float = 0.0, rate: float = 1.0) -> None:
        """From `true_s` on it is `ahead_s` further than it would be, and counts `rate` seconds a second.

        Raises ValueError for a clock that would stop or go back, which a monotonic one never does.
        """
        if ahead_s < 0 or rate <= 0:
            raise ValueError(f"a clock cannot be set ahead by {ahead_s} s at rate {rate}: both go forward")
        self._local_s, self._true_s = self.read(true_s) + ahead_s, true_s
        self._rate = rate

    @property
    def rate(self) -> float:
        """Its seconds per true second."""
        return self._rate

    @contextmanager
    def here(self) -> Generator[None]:
        """Within the block, what runs reads this clock."""
        token = CURRENT.set(self)
        try:
            yield
        finally:
            CURRENT.reset(token)
