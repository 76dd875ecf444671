"""A search over seeds: live many lives, count what happened, and make what breaks small.

In: seeds, and which faults to draw. Out: a `Verdict`; for each seed that broke a promise the error and the
fewest faults, of those that were drawn, with which it still breaks. Lives run in processes of their own.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from headrace.protocol.messages import Role
from headrace.sim.faults import Fault, Kind
from headrace.sim.life import CLUSTERS, FAULTS, Plan, Report, live, plan


@dataclass(frozen=True, slots=True)
class Scope:
    """Which lives are searched."""

    kinds: tuple[Kind, ...] = tuple(Kind)
    roles: tuple[tuple[str, Role], ...] | None = None
    """The one cluster of all lives; None: each draws one of several."""
    count: int = FAULTS
    keep: tuple[int, ...] | None = None
    """Of the drawn faults, only those with these numbers happen; None: all."""

    def plan(self, seed: int) -> Plan:
        clusters: Sequence[dict[str, Role]] = CLUSTERS if self.roles is None else [dict(self.roles)]
        drawn = plan(seed, kinds=self.kinds, clusters=clusters, count=self.count)
        return drawn if self.keep is None else with_faults(drawn, self.keep)


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
    steps: int = 0
    virtual_s: float = 0.0

    def add(self, found: Report | Failure) -> None:
        self.seeds += 1
        if isinstance(found, Failure):
            self.failures.append(found)
            return
        self.endings += found.endings
        self.faults += found.faults
        self.steps += found.steps
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
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(work))) as pool:
        for found in pool.imap(try_life, work):
            verdict.add(found)
            heard(verdict)
    return verdict


def try_life(work: tuple[int, Scope]) -> Report | Failure:
    """Live one life; where it breaks a promise, find the fewest faults with which it does."""
    seed, scope = work
    lived = scope.plan(seed)
    try:
        return live(seed, lived)
    except Exception as error:  # whatever it is, a life that does not come to its end has failed
        numbers = scope.keep if scope.keep is not None else tuple(range(len(lived.faults)))
        whole = replace(scope, keep=None).plan(seed)
        least = shrink(numbers, lambda kept: _fails(seed, with_faults(whole, kept)))
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
    return replace(whole, faults=tuple(whole.faults[number] for number in numbers))


def _fails(seed: int, lived: Plan) -> bool:
    try:
        live(seed, lived)
    except Exception:  # as in `try_life`
        return True
    return False
