"""What the gateway owes: accepted requests, where each one is, and all that was delivered of it.

The ledger is what survives a worker: a request goes on elsewhere from the tokens written down here.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.cluster.classes import RANKS, Band
from headrace.cluster.holdings import Prompt
from headrace.cluster.journey import Journey
from headrace.cluster.registry import Member
from headrace.cluster.stream import OutputStream
from headrace.protocol.requests import FinishReason, GenerateRequest, Progress


class Stage(enum.StrEnum):
    """Where a request is.

    WAITING    it has no worker: it is in the gateway's queue
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
    first_s: float = 0.0
    """When its first token came."""
    last_s: float = 0.0
    counts_as: FinishReason = FinishReason.CANCELLED
    """What its ending is, should it end by being cancelled."""
    cancelled: bool = False
    """Whether nobody wants more of it; its worker may not have said so yet."""
    cancelled_s: float | None = None
    """Since when."""


@dataclass(slots=True, eq=False)
class Leg:
    """One attempt at one worker."""

    name: str
    """Its request id on the worker's channel."""
    member: Member
    prefills_at: Member | None = None
    """Of a home: who computes the prompt for it, or is about to be told to."""

    @property
    def prefill_name(self) -> str:
        """Of a home: what the leg is called that computes the prompt for it."""
        return f"{self.name}/p"

    def plan_prefill(self, member: Member, tokens: int, band: Band) -> None:
        """Another worker has so many tokens of the prompt to compute, and will be told."""
        self.drop_plan()
        self.prefills_at = member
        member.expect(self.prefill_name, tokens, band)

    def drop_plan(self) -> None:
        """Nobody will be told to compute the prompt, who was not told before."""
        if self.prefills_at is not None:
            self.prefills_at.leaves(self.prefill_name)
            self.prefills_at = None


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
    prompt: Prompt | None = None
    """What its present attempt begins with."""
    prefill: Leg | None = None
    """Where its prompt is computed, or its blocks are held."""
    attempts: int = 0
    """Workers that it was given to, one after another."""
    failures: int = 0
    """Attempts that went wrong; a worker without room is none."""
    deaths: int = 0
    waits_since_s: float | None = None
    """When it had no worker at last; how often it found one without room since does not matter."""
    ended: list[int] = field(default_factory=list)
    answered: bool = False
    """Whether any sample has a token."""
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


class Ledger:
    """All requests of one gateway that have not ended, and the names under which workers know them."""

    def __init__(self) -> None:
        self.open_samples = 0
        """Samples that have not ended."""
        self.open_by_class: Counter[tuple[str, Band]] = Counter()
        """The same by model and class."""
        self._accepted: dict[str, Accepted] = {}
        self._legs: dict[str, Accepted] = {}  # by the name of a home or prefill leg

    def __iter__(self) -> Iterator[Accepted]:
        return iter(list(self._accepted.values()))

    def __len__(self) -> int:
        return len(self._accepted)

    def get(self, request_id: str) -> Accepted | None:
        return self._accepted.get(request_id)

    def enter(self, request: GenerateRequest, stream: OutputStream, journey: Journey, now: float) -> Accepted:
        """From now on the request is owed its endings."""
        samples = {index: Sample() for index in range(request.sampling.n)}
        accepted = Accepted(request, stream, now, journey, samples)
        self._accepted[request.request_id] = accepted
        self._count(accepted, len(samples))
        return accepted

    def end(self, accepted: Accepted, index: int) -> None:
        """One sample has ended, whoever said so; the request stays until it is struck off."""
        del accepted.samples[index]
        if accepted.home is not None:
            accepted.home.member.open_samples -= 1
        accepted.ended.append(index)
        self._count(accepted, -1)

    def strike_off(self, accepted: Accepted) -> None:
        """Nothing is owed any more."""
        self._count(accepted, -len(accepted.samples))
        del self._accepted[accepted.request.request_id]

    def _count(self, accepted: Accepted, change: int) -> None:
        request = accepted.request
        self.open_samples += change
        self.open_by_class[request.model, Band.of(request.priority)] += change

    def open_below(self, model: str, band: Band) -> int:
        """Samples of less urgent classes that have not ended."""
        return sum(self.open_by_class[model, other] for other in Band if RANKS[other] > RANKS[band])

    def open_above(self, model: str, band: Band) -> int:
        """Likewise of more urgent ones."""
        return sum(self.open_by_class[model, other] for other in Band if RANKS[other] < RANKS[band])

    def of_leg(self, name: str) -> Accepted | None:
        """The request that a worker speaks of, if it is still that worker's."""
        return self._legs.get(name)

    def open_leg(self, accepted: Accepted, name: str, member: Member) -> Leg:
        member.legs.add(name)
        self._legs[name] = accepted
        return Leg(name, member)

    def close_leg(self, leg: Leg) -> None:
        """Nothing that the worker may still say of this attempt counts."""
        leg.member.legs.discard(leg.name)
        leg.member.leaves(leg.name)
        leg.drop_plan()
        del self._legs[leg.name]
