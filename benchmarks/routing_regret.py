"""How much sooner a request's first token would have come from another worker than the one chosen.

A cluster of modelled workers serves a trace in virtual time (docs/simulation.md). At sampled decisions the
whole simulation is forked, once for each candidate: in its own fork, that candidate is chosen, and everything
goes on from there, later decisions included, until the request has its first token. Regret is the time that
the policy's choice took above the best of all, as a share of the best; the mean over the samples is told.

Forks are processes of this machine: as many at a time as --jobs says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.cluster.journey import Journey
from headrace.cluster.registry import Member
from headrace.cluster.routing import Candidates, Decision
from headrace.sim.fleet import PLANNED, Fleet, FleetOptions, simulate
from headrace.sim.fleet_setup import choose_worker
from headrace.sim.trace import at_rate, read_arrivals

CACHE_TOKENS = 1_000_000
MAX_MODEL_LEN = 131_072
WANTED = 0.15

_SECONDS = struct.Struct("<d")


class Enough(SystemExit):
    """All samples were taken. Of this kind, as it must end the simulation from within any of its tasks."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One decision: the first token's time from each candidate, and which one was chosen."""

    purpose: str
    ttft_s: list[float]
    chosen: int

    @property
    def regret(self) -> float:
        best = min(self.ttft_s)
        return (self.ttft_s[self.chosen] - best) / best


class Forks:
    """Stands between a fleet's gateway and its router."""

    def __init__(
        self, fleet: Fleet, count: int, every: int, after: int, jobs: int, chance: random.Random
    ) -> None:
        self._router = fleet.gateway._dispatch.router_of(fleet.gateway.registry.first_model)
        self._choose = self._router.choose
        self._fleet = fleet
        self._left, self._every, self._skip = count, every, after
        self._jobs = jobs
        self._chance = chance
        self.samples: list[Sample] = []
        self._router.choose = self.choose  # type: ignore[method-assign]

    def choose(self, among: Candidates, *, purpose: str) -> tuple[Member, Decision]:
        member, decision = self._choose(among, purpose=purpose)
        self._skip -= 1
        if self._skip < 0 and len(among) > 1 and self._chance.randrange(self._every) == 0:
            forced = self._try_all(among.members, among.wish.request_id, decision)
            if forced is not None:
                return forced
            if not self._left:
                raise Enough
        return member, decision

    def _try_all(
        self, members: Sequence[Member], request_id: str, decision: Decision
    ) -> tuple[Member, Decision] | None:
        """None in this process, where the samples are; in a fork, its candidate."""
        found: list[float] = [0.0] * len(members)
        running: list[tuple[int, int, int]] = []
        for candidate in range(len(members)):
            reads, writes = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reads)
                self._go_on_alone(request_id, writes)
                self._force(request_id, decision.purpose, members[candidate])
                return members[candidate], replace(decision, chosen=candidate)
            os.close(writes)
            running.append((candidate, pid, reads))
            if len(running) == self._jobs:
                self._collect(*running.pop(0), found)
        for one in running:
            self._collect(*one, found)
        self._left -= 1
        self.samples.append(Sample(decision.purpose, found, decision.chosen))
        print(
            f"{len(self.samples)} decisions, mean regret {mean_regret(self.samples):.1%}; the last for "
            f"{decision.purpose}: {found[decision.chosen]:.3f} s, {min(found):.3f} at best",
            file=sys.stderr,
            flush=True,
        )
        return None

    def _go_on_alone(self, request_id: str, writes: int) -> None:
        """In a fork: no more samples, and the end with the request's first token."""
        # A running loop is another process's after a fork.
        asyncio._set_running_loop(self._fleet.simulation.loop)
        note: Callable[..., None] = Journey.note

        def noted(journey: Journey, now: float, what: str, *rest: Any, **detail: Any) -> None:
            note(journey, now, what, *rest, **detail)
            if what == "first token" and journey.request_id == request_id:
                os.write(writes, _SECONDS.pack(now - journey.began_s))
                os._exit(0)

        Journey.note = noted  # type: ignore[method-assign, assignment]

    def _force(self, request_id: str, stage: str, member: Member) -> None:
        """Choose a member for this request whenever it is asked for; it may have to wait and ask again."""

        def choose(among: Candidates, *, purpose: str) -> tuple[Member, Decision]:
            chosen, decision = self._choose(among, purpose=purpose)
            if (among.wish.request_id, purpose) != (request_id, stage) or member not in among.members:
                return chosen, decision
            return member, replace(decision, chosen=among.members.index(member))

        self._router.choose = choose  # type: ignore[method-assign]

    @staticmethod
    def _collect(candidate: int, pid: int, reads: int, found: list[float]) -> None:
        answer = os.read(reads, _SECONDS.size)
        os.close(reads)
        os.waitpid(pid, 0)
        if len(answer) != _SECONDS.size:
            raise RuntimeError(f"the fork of candidate {candidate} ended before the first token")
        (found[candidate],) = _SECONDS.unpack(answer)


def mean_regret(samples: list[Sample]) -> float:
    return statistics.fmean(sample.regret for sample in samples)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="a trace of Mooncake's format")
    parser.add_argument("--decisions", type=int, default=500, help="that are replayed (500)")
    parser.add_argument("--every", type=int, default=4, help="one of so many, by chance (4)")
    parser.add_argument(
        "--after", type=int, default=600, help="decisions before the first: caches fill (600)"
    )
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second (8)")
    parser.add_argument("--policy", default="cost", help="that decides (cost)")
    parser.add_argument("--prefill", type=int, default=8, help="workers (8)")
    parser.add_argument("--decode", type=int, default=8, help="workers (8)")
    parser.add_argument("--hardware", default="h100", help="of the workers (h100)")
    parser.add_argument("--model", default="llama-70b", help="that they serve (llama-70b)")
    parser.add_argument("--jobs", type=int, default=2, help="forks at a time (2)")
    asked = parser.parse_args()
    worker = choose_worker(asked.hardware, asked.model, None, CACHE_TOKENS)
    options = FleetOptions(
        cost=worker.cost,
        prefill=asked.prefill,
        decode=asked.decode,
        cache_tokens=CACHE_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        nic_bytes_per_s=worker.nic_bytes_per_s,
        stride=1,
        gateway=replace(PLANNED, routing=replace(PLANNED.routing, policy=asked.policy)),
    )
    arrivals = at_rate(read_arrivals(asked.trace, MAX_MODEL_LEN), asked.rate)
    forks: list[Forks] = []

    async def prepare(fleet: Fleet) -> None:
        forks.append(Forks(fleet, asked.decisions, asked.every, asked.after, asked.jobs, random.Random(0)))

    with contextlib.suppress(Enough):
        simulate(arrivals, options, prepare=prepare)
    samples = forks[0].samples
    for purpose in sorted({sample.purpose for sample in samples}):
        some = [sample for sample in samples if sample.purpose == purpose]
        best = sum(sample.regret == 0.0 for sample in some) / len(some)
        print(
            f"{purpose}: {len(some)} decisions, mean regret {mean_regret(some):.1%}, median "
            f"{statistics.median(sample.regret for sample in some):.1%}, the best was chosen in {best:.0%}"
        )
    regret = mean_regret(samples)
    met = regret <= WANTED
    print(f"mean regret {regret:.1%}; wanted at most {WANTED:.0%}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
