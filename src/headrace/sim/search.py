"""A search over seeds: live many lives, count what happened, and make what breaks small.

In: seeds, and which faults to draw. Out: a `Verdict`; for each seed that broke a promise the error and the
fewest faults, of those that were drawn, with which it still breaks. Lives run in processes of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from headrace.protocol.messages import Role
from headrace.sim.cluster import Violation
from headrace.sim.faults import Fault, Kind
from headrace.sim.life import CLUSTERS, FAULTS, Computes, Plan, Report, live, plan
from headrace.sim.processes import in_processes

AGAIN_EVERY = 10
"""Of so many seeds one is lived twice, to see that its life is the same."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which lives are searched."""

    kinds: tuple[Kind, ...] = tuple(Kind)
    roles: tuple[tuple[str, Role], ...] | None = None
    """The one cluster of all lives; None: each draws one of several."""
    count: int = FAULTS
    keep: tuple[int, ...] | None = None
    """Of the drawn faults, only those with these numbers happen; None: all."""
    executor: Computes = "hash"
    again_every: int = AGAIN_EVERY
    """Lives of seeds that are multiples of this are lived twice, and must be the same; 0: none are."""

    def plan(self, seed: int) -> Plan:
        clusters: Sequence[dict[str, Role]] = CLUSTERS if self.roles is None else [dict(self.roles)]
        drawn = plan(seed, kinds=self.kinds, clusters=clusters, count=self.count, executor=self.executor)
        return drawn if self.keep is None else with_faults(drawn, self.keep)

    def live(self, seed: int, planned: Plan) -> Report:
        """Live a life, and perhaps once more. Raises what breaks, Diverged among it."""
        report = live(seed, planned)
        if self.again_every and seed % self.again_every == 0:
            again = live(seed, planned)
            if again.trace_hash != report.trace_hash:
                raise Diverged(
                    f"lived again, the life of seed {seed} was another one: its trace hash was "
                    f"{report.trace_hash} and then {again.trace_hash}"
                )
            report = replace(report, again=True)
        return report


class Diverged(Violation):
    """Two lives of one seed were not the same."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed whose life broke a promise."""

    seed: int
    error: str
    keep: tuple[int, ...]
    """The numbers of the fewest faults with which it still breaks one."""
    faults: tuple[Fault, ...]
    """These faults."""


@dataclass(slots=True)
class Verdict:
    """What a search has found."""

    seeds: int = 0
    failures: list[Failure] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Those that happened, by kind."""
    acted: Counter[str] = field(default_factory=Counter)
    """Those that met something, by kind."""
    requests: int = 0
    steps: int = 0
    least: Report | None = None
    """The life with the fewest steps."""
    again: int = 0
    """Lives that were lived twice, and were the same."""
    virtual_s: float = 0.0

    def add(self, found: Report | Failure) -> None:
        self.seeds += 1
        if isinstance(found, Failure):
            self.failures.append(found)
            return
        self.endings += found.endings
        self.faults += found.faults
        self.acted += found.acted
        self.requests += found.requests
        self.steps += found.steps
        self.again += found.again
        if self.least is None or found.steps < self.least.steps:
            self.least = found
        self.virtual_s += found.virtual_s


def search(
    seeds: Iterable[int],
    scope: Scope,
    *,
    jobs: int = 1,
    heard: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdict:
    """Live the lives of all seeds, `jobs` at a time; `heard` is called after each one."""
    verdict = Verdict()
    work = [(seed, scope) for seed in seeds]
    if jobs == 1 or len(work) < 2:
        for one in work:
            verdict.add(try_life(one))
            heard(verdict)
        return verdict
    for found in in_processes(try_life, work, jobs):
        verdict.add(found)
        heard(verdict)
    return verdict


def try_life(work: tuple[int, Scope]) -> Report | Failure:
    """Live one life; where it breaks a promise, find the fewest faults with which it does."""
    seed, scope = work
    lived = scope.plan(seed)
    try:
        return scope.live(seed, lived)
    except Exception as error:  # whatever it is, a life that does not come to its end has failed
        numbers = scope.keep if scope.keep is not None else tuple(range(len(lived.faults)))
        whole = replace(scope, keep=None).plan(seed)
        least = shrink(numbers, lambda kept: _fails(scope, seed, with_faults(whole, kept)))
        faults = with_faults(whole, least).faults
        return Failure(seed, f"{type(error).__name__}: {error}", least, faults)


def shrink(numbers: Sequence[int], fails: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """The fewest of `numbers` with which it still `fails`: by halves while that works, then one at a time."""
    kept = tuple(numbers)
    while len(kept) > 1:
        middle = len(kept) // 2
        half = next((half for half in (kept[:middle], kept[middle:]) if fails(half)), None)
        if half is None:
            break
        kept = half
    without = [0]
    while without:
        without = [i for i in range(len(kept)) if fails(kept[:i] + kept[i + 1 :])][:1]
        for i in without:
            kept = kept[:i] + kept[i + 1 :]
    return kept


def with_faults(whole: Plan, numbers: Iterable[int]) -> Plan:
    """The life with only these of its faults, counted from 0 in order of time."""
    faults = tuple(whole.faults[number] for number in numbers)
    if len(faults) == len(whole.faults):
        return whole
    # Fewer faults can meet fewer things; that a life lacks something of a standard one is no failure then.
    return replace(whole, faults=faults, acting=0, spare=())


def _fails(scope: Scope, seed: int, lived: Plan) -> bool:
    try:
        scope.live(seed, lived)
    except Exception:  # as in `try_life`
        return True
    return False
