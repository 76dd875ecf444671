"""More requests than a cluster can serve, of three classes: the load, and what is to be measured of it.

In: a rate and a seed; then a `FleetResult`. Out: arrivals; for each class how many were refused, how many met
their objectives, how long they waited; prompts computed in vain; how steady refusals were. Times in seconds,
lengths in tokens. It must not know how requests are admitted.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from headrace.cluster.classes import Band
from headrace.cluster.options import AdmissionOptions, ServiceLevels
from headrace.sim.cost import StepCost, device, model, rates_of
from headrace.sim.fleet import PLANNED, FleetOptions
from headrace.sim.fleet_result import FleetResult, Served
from headrace.sim.trace import Arrival, Piece

PRIORITIES = {Band.HIGH: -1, Band.NORMAL: 0, Band.LOW: 1}
REFUSED = "overloaded"
"""How a refused request ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Arrivals as of many users who do not know of each other (Poisson), and once more of them for a while.

    Lengths are drawn evenly from half to one and a half of what is given. No prompt has anything in common
    with another.
    """

    rate: float
    """Requests in a second, without the burst."""
    seconds: float
    shares: Mapping[Band, float] = field(
        default_factory=lambda: {Band.HIGH: 0.3, Band.NORMAL: 0.4, Band.LOW: 0.3}
    )
    """Of each class."""
    tenants: int = 4
    """That the requests of each class are from, in equal parts."""
    prompt_length: int = 8000
    output_length: int = 200
    burst_at_s: float = math.inf
    burst_s: float = 0.0
    burst: float = 1.0
    """How many times as many come in the burst."""

    def arrivals(self, seed: int) -> list[Arrival]:
        chance = random.Random(f"{seed} overload")
        bands, weights = list(self.shares), list(self.shares.values())
        found: list[Arrival] = []
        for number, at_s in enumerate(self._times(chance)):
            (band,) = chance.choices(bands, weights)
            found.append(
                Arrival(
                    f"r{number}",
                    at_s,
                    (Piece(number, _about(chance, self.prompt_length)),),
                    _about(chance, self.output_length),
                    seed=number,
                    priority=PRIORITIES[band],
                    tenant=f"t{chance.randrange(self.tenants)}",
                )
            )
        return found

    def _times(self, chance: random.Random) -> Iterator[float]:
        at_s = 0.0
        while True:
            inside = self.burst_at_s <= at_s < self.burst_at_s + self.burst_s
            at_s += chance.expovariate(self.rate * (self.burst if inside else 1.0))
            if at_s >= self.seconds:
                return
            yield at_s


def _about(chance: random.Random, mean: int) -> int:
    return max(1, round(chance.uniform(0.5 * mean, 1.5 * mean)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A cluster of llama-8b on one H100 a worker, and what its requests are like."""

    prefill: int
    decode: int
    max_num_seqs: int
    """Of each worker."""
    load: Load
    slo: ServiceLevels
    low_ttft_s: float

    def fleet(self, *, policy: str = "predictive", early_rejection: bool = True) -> FleetOptions:
        """Without strides, since these lengthen steps, by which TPOT is foreseen."""
        return FleetOptions(
            cost=StepCost(model("llama-8b"), rates_of(device("h100"))),
            prefill=self.prefill,
            decode=self.decode,
            cache_tokens=3_000_000,
            max_model_len=32_768,
            max_num_seqs=self.max_num_seqs,
            stride=1,
            gateway=replace(
                PLANNED,
                slo=self.slo,
                admission=AdmissionOptions(
                    policy=policy,
                    early_rejection=early_rejection,
                    reject_on_slo_violation=True,
                    low_priority_threshold_s=self.low_ttft_s,
                ),
            ),
        )

    @property
    def limits(self) -> dict[Band, tuple[float, float]]:
        """TTFT and TPOT that each class may expect."""
        slo = self.slo
        return {
            band: (self.low_ttft_s if band is Band.LOW else slo.ttft_s, slo.tpot_s)
            for band in self.load.shares
        }


PROMPTS = Scenario(
    prefill=2,
    decode=2,
    max_num_seqs=128,
    load=Load(rate=8.0, seconds=60.0, shares={Band.HIGH: 0.3, Band.NORMAL: 0.1, Band.LOW: 0.6}),
    slo=ServiceLevels(ttft_s=2.0, tpot_s=0.05),
    low_ttft_s=4.0,
)
"""Prefill is what lacks, as in most services: who is let in waits for its first token."""
ANSWERS = Scenario(
    prefill=8,
    decode=2,
    max_num_seqs=256,
    load=Load(rate=20.0, seconds=60.0, shares={Band.HIGH: 0.3, Band.NORMAL: 0.7}, output_length=150),
    slo=ServiceLevels(ttft_s=8.0, tpot_s=0.05),
    low_ttft_s=12.0,
)
"""Decoding is what lacks, and that is noticed late: when somebody is let in, its prefill comes first."""


@dataclass(frozen=True, slots=True)
class Window:
    """How many came in a time, and how many of these were refused."""

    asked: int
    refused: int


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Of the requests of one class."""

    asked: int
    refused: int
    met: int
    """Of those that were accepted, within TTFT and TPOT."""
    mean_ttft_s: float
    """Of those that were accepted."""

    @property
    def attainment(self) -> float:
        """The share that met them of those that were accepted; 1 where none was."""
        accepted = self.asked - self.refused
        return self.met / accepted if accepted else 1.0

    @property
    def refusals(self) -> float:
        return self.refused / self.asked if self.asked else 0.0


def by_class(
    result: FleetResult, arrivals: Sequence[Arrival], limits: Mapping[Band, tuple[float, float]]
) -> dict[Band, ClassFigures]:
    """`limits` are TTFT and TPOT of each class."""
    found = {}
    served = _of_classes(result, arrivals)
    for band, (ttft_s, tpot_s) in limits.items():
        mine = served[band]
        accepted = [one for one in mine if one.ended != REFUSED]
        waits = [one.ttft_s for one in accepted]
        found[band] = ClassFigures(
            len(mine),
            len(mine) - len(accepted),
            sum(one.meets(ttft_s, tpot_s) for one in accepted),
            sum(waits) / len(waits) if waits else math.nan,
        )
    return found


def _of_classes(result: FleetResult, arrivals: Sequence[Arrival]) -> dict[Band, list[Served]]:
    bands = {arrival.name: Band.of(arrival.priority) for arrival in arrivals}
    found: dict[Band, list[Served]] = {band: [] for band in Band}
    for one in result.requests:
        found[bands[one.name]].append(one)
    return found


def thrown_away(result: FleetResult) -> float:
    """The share of computed prompt tokens that no complete answer came of: those of requests that were cut
    off, and those that were computed once more. All of a run, from an empty cluster to its last ending."""
    done = [one for one in result.requests if one.complete]
    # An answer's last token is told and never computed.
    needed = sum(one.prompt_tokens - one.cached_tokens + one.output_tokens - 1 for one in done)
    computed = sum(use.tokens for use in result.workers.values())
    prompts = sum(one.prompt_tokens - one.cached_tokens for one in done)
    wasted = computed - needed
    return wasted / (prompts + wasted) if prompts + wasted else 0.0


def over_time(served: Collection[Served], begin_s: float, end_s: float, window_s: float) -> list[Window]:
    """What came in each whole window of this time, in order."""
    count = int((end_s - begin_s) // window_s)
    asked, refused = [0] * count, [0] * count
    for one in served:
        at = math.floor((one.at_s - begin_s) / window_s)
        if 0 <= at < count:
            asked[at] += 1
            refused[at] += one.ended == REFUSED
    return [Window(*both) for both in zip(asked, refused, strict=True)]


def may_be_refused(result: FleetResult, arrivals: Sequence[Arrival]) -> list[Served]:
    """All but those of high priority."""
    served = _of_classes(result, arrivals)
    return [*served[Band.NORMAL], *served[Band.LOW]]


def unsteadiness(windows: Sequence[Window]) -> float:
    """The variance of how many are let in per window over their mean (Fano factor).

    A gate that lets in what can be served lets in about as many in each window, however many come: about 1 or
    2, as it is by chance for those who come at random. One that lets in all for a while and then nobody has a
    multiple of that. 0 where nobody was refused.
    """
    if not any(window.refused for window in windows):
        return 0.0
    admitted = [window.asked - window.refused for window in windows]
    return statistics.variance(admitted) / max(statistics.mean(admitted), 1e-9)
