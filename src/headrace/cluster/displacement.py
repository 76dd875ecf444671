"""Who makes way when all places are taken: the least urgent, and in the same class who has the most places.

In: those who wait, in calls that are served whole or not at all, and a newcomer. Out: the items that would
have to leave for it, or nobody. It ends nothing itself, and whoever has begun to be served is never asked.

Of less urgent classes anybody makes way, the least urgent first; of its own class a tenant that has at least
as many places afterwards as the newcomer's. So the newcomer's class never loses by it, whoever was displaced
cannot displace back, and places of one class move towards equal shares. Of a tenant the last come goes first:
those before it keep their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from headrace.cluster.classes import RANKS, Band
from headrace.cluster.waiting import Waiting

T = TypeVar("T", bound=Hashable)


class _Leaving(Generic[T]):
    """Who leaves, call by call."""

    def __init__(self, line: Waiting[T], call_of: Callable[[T], tuple[T, ...]], lacking: int) -> None:
        self._line = line
        self._call_of = call_of
        self.lacking = lacking
        self.items: dict[T, None] = {}

    def take(self, band: Band, held: dict[str, int], least: int) -> None:
        """Of these tenants, whoever has the most of what it `held` first; each keeps at least so much."""
        last = {tenant: self._calls(band, tenant) for tenant in held}
        while self.lacking > 0 and held:
            most = max(held, key=lambda tenant: (held[tenant], tenant))
            call, samples = next(last[most], ((), 0))
            if not call or held[most] - samples < least:
                del held[most]
                continue
            self.items.update(dict.fromkeys(call))
            held[most] -= samples
            self.lacking -= samples

    def _calls(self, band: Band, tenant: str) -> Iterator[tuple[tuple[T, ...], int]]:
        for item in self._line.latest(band, tenant):
            if item not in self.items and (call := self._call_of(item)):
                yield call, sum(self._line.place_of(one).samples for one in call)


def who_makes_way(
    line: Waiting[T],
    band: Band,
    tenant: str,
    samples: int,
    lacking: int,
    call_of: Callable[[T], tuple[T, ...]],
) -> list[T] | None:
    """Who leaves so that `lacking` places come free for a newcomer of so many `samples`; None: too few may.

    `call_of` an item are all that go with it, itself among them; nobody where part of them is not waiting.
    """
    leaving = _Leaving(line, call_of, lacking)
    for other in sorted(Band, key=RANKS.__getitem__, reverse=True):
        held = line.held(other)
        if RANKS[other] > RANKS[band]:
            leaving.take(other, held, least=0)
        elif other is band:
            own = held.pop(tenant, 0) + samples
            leaving.take(other, {one: count for one, count in held.items() if count > own}, least=own)
    return list(leaving.items) if leaving.lacking <= 0 else None
