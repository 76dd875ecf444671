"""Faults for a simulated cluster: what can go wrong, and when, drawn from a seed.

In: a random stream and the workers. Out: a list of `Fault`s, plain data in order of time, which can be
written down, shortened and played again. It must not know how to make them happen (`sim/mishaps.py`).

Half of all lists are drawn from a few kinds only, and many faults follow another one closely, at the same
place: what breaks only when two things meet is met more often than by chance.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.protocol.messages import Role


class Kind(enum.StrEnum):
    CRASH = "crash"
    """A worker's machine resets its connections and starts again after `for_s`."""
    END = "end"
    """The same, with connections that end in order."""
    POWER = "power"
    """The same, silently."""
    ENGINE = "engine"
    """A worker's engine process dies; its supervisor starts another."""
    AGENT = "agent"
    """What reads and shows a worker's KV blocks (NIXL's process) dies, and is started again."""
    CUT = "cut"
    """Nothing passes between two hosts for `for_s`."""
    CUT_ONE_WAY = "cut one way"
    BREAK = "break"
    """All connections between two hosts break."""
    BREAK_LATER = "break later"
    """One connection between gateway and worker breaks after `amount` bytes, in the middle of a message."""
    BREAK_PULL = "break pull"
    """One connection over which blocks come breaks after `amount` bytes, in the middle of a block."""
    CORRUPT = "corrupt"
    """One byte of what a source of blocks sends to a target changes on the way, `amount` bytes from now."""
    SLOW = "slow"
    """A worker's steps take `amount` times as long for `for_s`."""
    FREEZE = "freeze"
    """A worker's engine ends no step for `for_s`."""
    DRAIN = "drain"
    """A worker is drained, leaves, and starts again after `for_s`."""
    GATEWAY = "gateway"
    """A gateway's machine resets its connections, and starts again after `for_s`, knowing nothing."""
    GATEWAY_END = "gateway end"
    """The same, with connections that end in order."""
    GATEWAY_POWER = "gateway power"
    """The same, silently."""
    LATE = "late"
    """Every packet between two hosts takes `amount` ms longer for `for_s`: orders and tickets are stale."""
    NARROW = "narrow"
    """Between a source of blocks and a target pass `amount` bytes a second for `for_s`: transfers last."""
    STALE = "stale ticket"
    """Somebody comes again with the last `amount` tickets of a source, perhaps of a former engine there."""
    CLOCK_RATE = "clock drift"
    """A host's clock counts `amount` thousandths of a second in a second for `for_s`."""
    CLOCK_STEP = "clock step"
    """A host's clock jumps `amount` ms ahead."""
    CANCEL = "cancel"
    """All that a gateway serves is cancelled, each `amount` callbacks after the one before: at any await."""
    FULL = "full queue"
    """`amount` requests come to a gateway at once, so that queues are full."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Times in seconds since the load began."""

    at_s: float
    kind: Kind
    where: str
    other: str = ""
    for_s: float = 0.0
    amount: int = 0


WITHIN_S = 0.3
"""How closely a fault follows another one with which it belongs together."""
FEW_KINDS = 5

_ONLY_HANDOFFS = (Kind.BREAK_PULL, Kind.CORRUPT, Kind.NARROW, Kind.STALE)
_OF_GATEWAYS = (Kind.GATEWAY, Kind.GATEWAY_END, Kind.GATEWAY_POWER, Kind.CANCEL, Kind.FULL)
_OF_ALL = (Kind.CLOCK_RATE, Kind.CLOCK_STEP)
_BETWEEN = (Kind.CUT, Kind.CUT_ONE_WAY, Kind.BREAK, Kind.LATE)

_AMOUNTS = {
    Kind.SLOW: (20,),
    Kind.LATE: (20, 100, 500, 1500),
    Kind.NARROW: (500, 2_000),
    Kind.BREAK_LATER: (0, 100, 700, 2000, 10_000),
    Kind.BREAK_PULL: (0, 50, 100, 300, 700),
    Kind.CORRUPT: (0, 50, 100, 300, 700),
    Kind.STALE: (1, 5, 40),
    Kind.CLOCK_RATE: (500, 900, 1100, 2000),
    Kind.CLOCK_STEP: (100, 1000, 5000),
    Kind.CANCEL: (1, 3, 17, 101),
    Kind.FULL: (40, 80),
}
_FOR_S = (0.05, 0.3, 1.0, 4.0)


def handoffs(roles: Mapping[str, Role]) -> list[tuple[str, str]]:
    """Between which workers blocks travel, as (source, target)."""
    sources = [name for name, role in roles.items() if role is Role.PREFILL]
    if sources:
        return [(source, name) for source in sources for name, role in roles.items() if role.decodes]
    sources = [name for name, role in roles.items() if role.prefills_for_others]
    return [(source, name) for source in sources for name, role in roles.items() if role is Role.DECODE]


def draw(
    chance: random.Random,
    roles: Mapping[str, Role],
    count: int,
    within_s: float,
    *,
    gateways: Sequence[str],
    kinds: Sequence[Kind] = tuple(Kind),
) -> list[Fault]:
    """`count` faults of these `kinds`, as far as they can happen in such a cluster, in order of time."""
    places = {kind: at for kind in kinds if (at := _places(kind, roles, gateways))}
    drawn = list(places)
    if drawn and chance.random() < 0.5:
        drawn = chance.sample(drawn, min(FEW_KINDS, len(drawn)))
    faults: list[Fault] = []
    for _ in range(count if drawn else 0):
        kind = chance.choice(drawn)
        at_s, candidates = chance.uniform(0, within_s), places[kind]
        if faults and chance.random() < 0.4:
            last = faults[-1]
            at_s = last.at_s + chance.uniform(0, WITHIN_S)
            near = [place for place in candidates if {last.where, last.other} & set(place) - {""}]
            candidates = near or candidates
        where, other = chance.choice(candidates)
        amount = chance.choice(_AMOUNTS.get(kind, (0,)))
        faults.append(Fault(at_s, kind, where, other, chance.choice(_FOR_S), amount))
    return sorted(faults, key=lambda fault: fault.at_s)


def _places(kind: Kind, roles: Mapping[str, Role], gateways: Sequence[str]) -> list[tuple[str, str]]:
    """Where a fault of this kind can happen, as (where, other)."""
    if kind in _ONLY_HANDOFFS:
        return handoffs(roles)
    if kind in _OF_GATEWAYS:
        return [(gateway, "") for gateway in gateways]
    if kind in _OF_ALL:
        return [(host, "") for host in (*gateways, *roles)]
    controls = [(worker, gateway) for worker in roles for gateway in gateways]
    if kind is Kind.BREAK_LATER:
        return controls + [(gateway, worker) for worker, gateway in controls]
    if kind in _BETWEEN:
        return controls + handoffs(roles) * 2
    return [(worker, "") for worker in roles]
