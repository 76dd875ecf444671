"""Classes of service: whose request it is, what is measured of it, and why it was not let in.

Words that admission decides by and that those who measure count by; nothing is decided here.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from headrace.engine.limits import RequestRefused
from headrace.protocol.requests import ErrorCode


class Band(enum.StrEnum):
    """Classes of service, by a request's priority: below 0, 0, above 0."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @classmethod
    def of(cls, priority: int) -> Band:
        return cls.NORMAL if priority == 0 else cls.HIGH if priority < 0 else cls.LOW


RANKS = {band: rank for rank, band in enumerate(Band)}
"""0 is the most urgent."""


class Slo(enum.StrEnum):
    """What a request may expect a limit for: its first token, and each further one on average."""

    TTFT = "ttft"
    TPOT = "tpot"


@dataclass(frozen=True, slots=True)
class Taken:
    """A step of the ladder that was taken."""

    step: str
    """As `n=1`."""
    pressure: float
    """What of it the step could relieve."""
    above: float
    """From where on it is taken."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was foreseen for a request as it stood, against what its class may expect. Times in seconds."""

    band: Band
    ttft_s: float
    ttft_limit_s: float
    tpot_s: float
    tpot_limit_s: float | None
    """None where the class is not held to one."""
    pressure: float
    """The worse of the two against its limit; above 1 it would be missed."""

    def detail(self) -> dict[str, str | float]:
        """By name, for a journey."""
        found: dict[str, str | float] = {
            "class": self.band,
            "pressure": round(self.pressure, 4),
            "ttft_s": self.ttft_s,
            "ttft_limit_s": self.ttft_limit_s,
            "tpot_s": self.tpot_s,
        }
        return found if self.tpot_limit_s is None else {**found, "tpot_limit_s": self.tpot_limit_s}


MOST_RETRY_S = 60
"""Nobody is told to stay away for longer: by then much is different."""


def retry_after_s(seconds: float) -> int:
    """When to try again what could be served in so many seconds, infinitely many included."""
    return max(1, math.ceil(min(seconds, MOST_RETRY_S)))


def about(seconds: float) -> str:
    """For people, as exact as it is worth."""
    return f"about {seconds:.1f} s" if seconds <= MOST_RETRY_S else f"more than {MOST_RETRY_S} s"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What requests of one call are foreseen to find. In seconds."""

    ttft_s: float
    tpot_s: float
    elsewhere_s: float = 0.0
    """Of TTFT, what workers take that decode nothing; fewer samples and shorter answers cannot shorten it."""
    own_s: float = 0.0
    """Of TTFT, what computing their own prompts takes; no wait shortens it."""
    beside: float = 0.0
    """Samples that decode beside theirs."""
    row_s: float = 0.0
    """What each of these adds to TPOT."""
    lasts_s: float = 0.0
    """How long each of these lasts, on average."""
    untried: bool = False
    """Whether a worker that would do it is idle, and has not shown for a while how fast it is."""

    def eases_in_s(self, tpot_s: float) -> float:
        """Until so many of those beside have ended that TPOT would be this; infinite: it would not be."""
        too_many = (self.tpot_s - tpot_s) / self.row_s if self.row_s > 0 else math.inf
        if too_many <= 0:
            return 0.0
        return (
            self.lasts_s * math.log(self.beside / (self.beside - too_many))
            if too_many < self.beside
            else math.inf
        )


class WouldWait(RequestRefused):
    """Refused for what it is foreseen to wait: which limit it would miss."""

    def __init__(self, slo: Slo, message: str, *, retry_after_s: int) -> None:
        super().__init__(ErrorCode.OVERLOADED, message, retry_after_s=retry_after_s)
        self.slo = slo


class Refusal(enum.StrEnum):
    """Why a request was not accepted."""

    INVALID = "invalid"  # it can never be served as it is
    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"  # it waited, and its place went to another
    PREDICTED_TTFT = "predicted_ttft"
    PREDICTED_TPOT = "predicted_tpot"
    UNAVAILABLE = "unavailable"  # no worker serves

    @classmethod
    def of(cls, refused: RequestRefused) -> Refusal:
        if isinstance(refused, WouldWait):
            return cls.PREDICTED_TTFT if refused.slo is Slo.TTFT else cls.PREDICTED_TPOT
        code = refused.error.code
        if code is ErrorCode.OVERLOADED:
            return cls.QUEUE_FULL
        return cls.INVALID if code is ErrorCode.INVALID else cls.UNAVAILABLE
