"""What the gateway owes: accepted requests, where each one is, and all that was delivered of it.

The ledger is what survives a worker: a request goes on elsewhere from the tokens written down here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headrace.cluster.journey import Journey
from headrace.cluster.registry import Member
from headrace.cluster.stream import OutputStream
from headrace.protocol.requests import FinishReason, GenerateRequest, Progress


class Stage(enum.StrEnum):
    """Where a request is.

    WAITING    it has no worker: the one that it had is gone, and no other was free yet
    RESERVING  its home reserves blocks for a prompt that is to be prefilled elsewhere
    PREFILLING a prefill worker computes the prompt
    AT_HOME    its home has all that it needs
    """

    WAITING = "waiting"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    AT_HOME = "at home"


@dataclass(slots=True, eq=False)
class Sample:
    """One sample that has not ended."""

    tokens: list[int] = field(default_factory=list)
    """All that was delivered."""
    last_s: float = 0.0
    counts_as: FinishReason = FinishReason.CANCELLED
    """What its ending is, should it end by being cancelled."""


@dataclass(slots=True, eq=False)
class Leg:
    """One attempt at one worker."""

    name: str
    """Its request id on the worker's channel."""
    member: Member


@dataclass(slots=True, eq=False)
class Accepted:
    """A request, and what has not ended of it."""

    request: GenerateRequest
    stream: OutputStream
    began_s: float
    journey: Journey
    samples: dict[int, Sample]
    stage: Stage = Stage.WAITING
    home: Leg | None = None
    """Where it is decoded."""
    prefill: Leg | None = None
    """Where its prompt is computed, or its blocks are held."""
    attempts: int = 0
    deaths: int = 0
    waits_since_s: float = 0.0
    ended: list[int] = field(default_factory=list)
    told_prompt: bool = False
    """Whether the number of cached tokens, and the prompt's log-probabilities, were delivered."""

    @property
    def progress(self) -> Progress:
        """How far it has come, for its next attempt."""
        return Progress(
            generated={index: list(sample.tokens) for index, sample in self.samples.items() if sample.tokens},
            ended=list(self.ended),
            prompt_logprobs_told=self.told_prompt,
        )
