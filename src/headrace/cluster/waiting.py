"""Who waits, and who is next: strict bands, and turns between tenants inside a band.

    high   ─▶ who comes again ─▶ tenants in turn ─┐
    normal ─▶ who comes again ─▶ tenants in turn ─┼─▶ the first that fits
    low    ─▶ who comes again ─▶ tenants in turn ─┘

In: items, each with its class, its tenant, and what it costs. Out: the next one. It must not know what waits,
for what, or since when.

Turns are start-time fair queueing (Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996), with tokens
for bytes: a tenant's tag grows by the cost of each item of it that is served, the lowest tag is next, and who
begins to wait has at least the tag that was served last. So idle time is no credit, and of two tenants that
both have something waiting all the while, neither gets more than the largest item of each ahead of the other.
With requests for packets this is the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024.

Inside a tenant the first come is the first served. An item that does not fit holds nobody back: the next that
fits goes before it. All of it costs O(log tenants), and one step more for each tenant that is passed over.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from headrace.cluster.classes import RANKS, Band

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be free for an item; those with equal needs fit together or not at all."""

    samples: int = 1
    prefill: bool = False
    """Whether another worker is to compute the prompt."""


Fits = Callable[[Band, Needs], bool]


@dataclass(frozen=True, slots=True)
class Place:
    """What an item is in a line for. `tokens` and `samples` are what others wait for behind it."""

    band: Band
    tenant: str = ""
    cost: float = 1.0
    """That its tenant is charged."""
    tokens: float = 0.0
    samples: int = 1
    needs: Needs = Needs()


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is served before a newcomer."""

    tokens: float = 0.0
    samples: float = 0.0
    overtaking_per_s: float = 0.0
    """Tokens of more urgent newcomers, every second that it waits."""
    joining_per_s: float = 0.0
    """Samples of these, every second that it decodes."""
    together: int = 0
    """Samples of others that came with it, in one call."""
    together_tokens: float = 0.0
    """Of their prompts."""
    yielding: int = 0
    """Samples of less urgent classes at workers, which leave their rows to it."""


NOBODY = Ahead()


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    number: int
    place: Place
    again: bool


class _Line(Generic[T]):
    """Items of one tenant in the order of their coming, by what they need."""

    def __init__(self) -> None:
        self.tag = 0.0
        self.cost, self.tokens, self.samples = 0.0, 0.0, 0
        self._by_needs: dict[Needs, OrderedDict[int, _Entry[T]]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_needs)

    def add(self, entry: _Entry[T]) -> None:
        alike = self._by_needs.setdefault(entry.place.needs, OrderedDict())
        later = bool(alike) and next(reversed(alike)) > entry.number
        alike[entry.number] = entry
        if later:  # who came before them has changed its needs after them
            for number in [number for number in alike if number > entry.number]:
                alike.move_to_end(number)
        self._count(entry.place, 1)

    def remove(self, entry: _Entry[T]) -> None:
        alike = self._by_needs[entry.place.needs]
        del alike[entry.number]
        if not alike:
            del self._by_needs[entry.place.needs]
        self._count(entry.place, -1)

    def latest(self) -> Iterator[_Entry[T]]:
        """The last come first."""
        alike = [reversed(one.values()) for one in self._by_needs.values()]
        return heapq.merge(*alike, key=lambda entry: -entry.number)

    def first(self, fits: Callable[[Needs], bool]) -> _Entry[T] | None:
        """The first come of those that fit."""
        heads = [next(iter(alike.values())) for needs, alike in self._by_needs.items() if fits(needs)]
        return min(heads, key=lambda entry: entry.number, default=None)

    def _count(self, place: Place, sign: int) -> None:
        self.cost += sign * place.cost
        self.tokens += sign * place.tokens
        self.samples += sign * place.samples


@dataclass(slots=True)
class _Band(Generic[T]):
    """Everybody of one class."""

    entries: OrderedDict[T, _Entry[T]] = field(default_factory=OrderedDict)
    again: _Line[T] = field(default_factory=_Line)
    lines: dict[str, _Line[T]] = field(default_factory=dict)
    """Of the tenants that have something waiting."""
    heap: list[tuple[float, int, str]] = field(default_factory=list)
    """Tags of these, with the turn in which they got them; one with another tag than its line's is old."""
    owed: dict[str, float] = field(default_factory=dict)
    """Tags of tenants that have nothing waiting, where they are above `now`."""
    most_owed: int = 64
    """With more of them, look which still are."""
    needs: Counter[Needs] = field(default_factory=Counter)
    now: float = 0.0
    """The tag that was served last: virtual time."""
    tokens: float = 0.0
    samples: int = 0


class Waiting(Generic[T]):
    """All that wait for the same workers."""

    def __init__(self) -> None:
        self._bands: dict[Band, _Band[T]] = {band: _Band() for band in Band}
        self._turn = 0

    def __len__(self) -> int:
        return sum(len(band.entries) for band in self._bands.values())

    def __contains__(self, item: T) -> bool:
        return any(item in band.entries for band in self._bands.values())

    def __iter__(self) -> Iterator[T]:
        """The most urgent band first, inside it in the order of coming."""
        for band in self._bands.values():
            yield from band.entries

    def of(self, band: Band) -> OrderedDict[T, _Entry[T]]:
        """Those of one band in the order of their coming."""
        return self._bands[band].entries

    def held(self, band: Band) -> dict[str, int]:
        """Samples of each tenant in one band, without those that came again."""
        return {tenant: line.samples for tenant, line in self._bands[band].lines.items()}

    def latest(self, band: Band, tenant: str) -> Iterator[T]:
        """Of one tenant in one band the last come first, without those that came again."""
        line = self._bands[band].lines.get(tenant)
        return (entry.item for entry in line.latest()) if line is not None else iter(())

    def before(self, band: Band) -> int:
        """How many wait of this band and the more urgent ones."""
        return sum(len(one.entries) for name, one in self._bands.items() if RANKS[name] <= RANKS[band])

    @property
    def samples(self) -> int:
        return sum(band.samples for band in self._bands.values())

    @property
    def tokens(self) -> float:
        return sum(band.tokens for band in self._bands.values())

    def samples_below(self, band: Band) -> int:
        """Of those that are less urgent."""
        return sum(one.samples for name, one in self._bands.items() if RANKS[name] > RANKS[band])

    def add(self, item: T, place: Place, *, again: bool = False) -> None:
        """An item begins to wait; one that comes `again` before all others of its band, and is not charged.

        ValueError where it waits already.
        """
        if item in self:
            raise ValueError(f"{item!r} waits already")
        band = self._bands[place.band]
        self._turn += 1
        entry = _Entry(item, self._turn, place, again)
        band.entries[item] = entry
        band.needs[place.needs] += 1
        band.tokens += place.tokens
        band.samples += place.samples
        if again:
            band.again.add(entry)
            return
        line = band.lines.get(place.tenant)
        if line is None:
            line = band.lines[place.tenant] = _Line()
            self._retag(band, place.tenant, max(band.now, band.owed.pop(place.tenant, 0.0)))
        line.add(entry)

    def remove(self, item: T) -> None:
        """An item waits no more; one that does not wait is left alone. Nobody is charged for it."""
        for band in self._bands.values():
            if (entry := band.entries.get(item)) is not None:
                self._drop(band, entry)
                return

    def place_of(self, item: T) -> Place:
        """Of an item that waits."""
        return next(band.entries[item].place for band in self._bands.values() if item in band.entries)

    def change(self, item: T, needs: Needs) -> None:
        """An item that waits needs something else; its place stays the same."""
        band = next(band for band in self._bands.values() if item in band.entries)
        entry = band.entries[item]
        line = band.again if entry.again else band.lines[entry.place.tenant]
        line.remove(entry)
        band.needs[entry.place.needs] -= 1
        band.needs += Counter([needs])
        entry.place = replace(entry.place, needs=needs)
        line.add(entry)

    def first(self, fits: Fits) -> T | None:
        """Who is next among those that fit; None: nobody is."""
        for name, band in self._bands.items():
            if not any(fits(name, needs) for needs in band.needs):
                continue
            if (entry := self._first(band, name, fits)) is not None:
                return entry.item
        return None

    def serve(self, item: T) -> None:
        """An item that waits goes on, and its tenant is charged."""
        band = next(band for band in self._bands.values() if item in band.entries)
        entry = band.entries[item]
        if not entry.again:
            line, tenant = band.lines[entry.place.tenant], entry.place.tenant
            band.now = max(band.now, line.tag)
            self._retag(band, tenant, line.tag + entry.place.cost)
        self._drop(band, entry)

    def ahead(self, place: Place) -> Ahead:
        """What would be served before an item with such a place, if nobody else came. O(tenants of its band).

        Of each other tenant of its band, no more than its own comes first.
        """
        tokens, samples = 0.0, 0.0
        for name, band in self._bands.items():
            if RANKS[name] < RANKS[place.band]:
                tokens, samples = tokens + band.tokens, samples + band.samples
        band = self._bands[place.band]
        tokens, samples = tokens + band.again.tokens, samples + band.again.samples
        own = band.lines.get(place.tenant)
        last = place.cost if own is None else place.cost + own.cost
        for line in band.lines.values():
            share = 1.0 if line is own else min(1.0, last / max(line.cost, 1e-9))
            tokens, samples = tokens + share * line.tokens, samples + share * line.samples
        return Ahead(tokens, samples)

    def is_first(self, band: Band) -> bool:
        """Whether a newcomer of this band has nobody of it, or of a more urgent one, before itself."""
        return not self.before(band)

    def _first(self, band: _Band[T], name: Band, fits: Fits) -> _Entry[T] | None:
        def fit(needs: Needs) -> bool:
            return fits(name, needs)

        if (found := band.again.first(fit)) is not None:
            return found
        passed: list[tuple[float, int, str]] = []
        while band.heap and found is None:
            tag, _, tenant = mark = heapq.heappop(band.heap)
            line = band.lines.get(tenant)
            if line is None or line.tag != tag:
                continue
            passed.append(mark)
            found = line.first(fit)
        for mark in passed:
            heapq.heappush(band.heap, mark)
        return found

    def _retag(self, band: _Band[T], tenant: str, tag: float) -> None:
        self._turn += 1
        band.lines[tenant].tag = tag
        heapq.heappush(band.heap, (tag, self._turn, tenant))
        if len(band.heap) > 2 * len(band.lines) + 64:
            band.heap = [
                mark for mark in band.heap if (line := band.lines.get(mark[2])) and line.tag == mark[0]
            ]
            heapq.heapify(band.heap)

    def _drop(self, band: _Band[T], entry: _Entry[T]) -> None:
        place = entry.place
        del band.entries[entry.item]
        band.tokens -= place.tokens
        band.samples -= place.samples
        band.needs[place.needs] -= 1
        if not band.needs[place.needs]:
            del band.needs[place.needs]
        if entry.again:
            band.again.remove(entry)
        else:
            line = band.lines[place.tenant]
            line.remove(entry)
            if not line:
                del band.lines[place.tenant]
                if line.tag > band.now:
                    band.owed[place.tenant] = line.tag
        if not band.entries:  # a busy time is over: nobody owes anybody
            self._bands[place.band] = _Band()
        elif len(band.owed) > band.most_owed:
            band.owed = {tenant: tag for tenant, tag in band.owed.items() if tag > band.now}
            band.most_owed = 2 * len(band.owed) + 64
