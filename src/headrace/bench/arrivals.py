"""When requests are due: a renewal process of gamma-distributed gaps, at a constant rate or on a ramp.

The gaps are drawn at unit rate and carried to real time through the inverse of the expected number of
arrivals, so burstiness means the same at every rate (time rescaling of an inhomogeneous process).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.bench.errors import BenchError

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second: `begin` at the start, changing linearly to `end` at `over_s`, and `end` from
    then on.
    """

    begin: float
    end: float
    over_s: float

    @classmethod
    def constant(cls, rate: float) -> Rate:
        """Raises BenchError unless `rate` is positive and finite."""
        return cls.ramp(rate, rate, 0.0)

    @classmethod
    def ramp(cls, begin: float, end: float, over_s: float) -> Rate:
        """Raises BenchError unless both ends are positive and finite."""
        for rate in (begin, end):
            if not 0 < rate < math.inf:
                raise BenchError(f"a rate must be above 0 requests per second and finite, got {rate:g}")
        return cls(begin, end, over_s)

    def when(self, count: float) -> float:
        """The time by which `count` arrivals are expected, in seconds."""
        slope = (self.end - self.begin) / self.over_s if self.over_s > 0 else 0.0
        expected = (self.begin + self.end) / 2 * self.over_s
        if count >= expected:
            return self.over_s + (count - expected) / self.end
        # begin * t + slope / 2 * t^2 = count, in the form that keeps its digits when the slope is small
        return 2 * count / (self.begin + math.sqrt(self.begin**2 + 2 * slope * count))


def arrivals(rate: Rate, burstiness: float, generator: np.random.Generator) -> Iterator[float]:
    """Due times in seconds, without end; the first is 0.

    The gaps have the shape parameter `burstiness`: 1 is a Poisson process, below is burstier, above more
    even, and infinity ticks like a clock. Raises BenchError for what is not positive.
    """
    if not burstiness > 0:
        raise BenchError(f"burstiness must be above 0 (1 is Poisson), got {burstiness:g}")
    return itertools.chain([0.0], _later(rate, burstiness, generator))


def _later(rate: Rate, burstiness: float, generator: np.random.Generator) -> Iterator[float]:
    count = 0.0
    while True:
        if math.isinf(burstiness):
            gaps = np.ones(_BATCH)
        else:
            gaps = generator.gamma(burstiness, 1 / burstiness, _BATCH)
        for gap in gaps.tolist():
            count += gap
            yield rate.when(count)
