"""Faults for a simulated cluster: what can go wrong, and when, drawn from a seed.

In: a random stream and the names of workers. Out: a list of `Fault`s, plain data in order of time, and the
means to make each happen. A list can be written down, shortened and played again.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.sim.cluster import GATEWAY, SimCluster
from headrace.sim.link import DATACENTRE, LinkProfile
from headrace.sim.network import Crash


class Kind(enum.StrEnum):
    CRASH = "crash"
    """A worker's machine resets its connections and starts again after `for_s`."""
    END = "end"
    """The same, with connections that end in order."""
    POWER = "power"
    """The same, silently."""
    ENGINE = "engine"
    """A worker's engine process dies; its supervisor starts another."""
    CUT = "cut"
    """Nothing passes between two hosts for `for_s`."""
    CUT_ONE_WAY = "cut one way"
    BREAK = "break"
    """All connections between two hosts break."""
    BREAK_LATER = "break later"
    """One connection between two hosts breaks after `amount` bytes, perhaps in the middle of a block."""
    CORRUPT = "corrupt"
    """One byte from one worker to another changes on the way, `amount` bytes from now."""
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
    """Between two workers pass `amount` bytes a second for `for_s`: transfers last."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Times in seconds since the load began."""

    at_s: float
    kind: Kind
    where: str
    other: str = ""
    for_s: float = 0.0
    amount: int = 0


DRAIN_TIMEOUT_S = 20.0

_BETWEEN = (Kind.CUT, Kind.CUT_ONE_WAY, Kind.BREAK, Kind.BREAK_LATER, Kind.LATE)
_OF_GATEWAYS = (Kind.GATEWAY, Kind.GATEWAY_END, Kind.GATEWAY_POWER)

_AMOUNTS = {
    Kind.SLOW: (20,),
    Kind.LATE: (20, 100, 500, 1500),
    Kind.NARROW: (500, 2_000),
}
_BYTES = (0, 100, 700, 2000, 10_000)


def draw(
    generator: random.Random,
    workers: Sequence[str],
    count: int,
    within_s: float,
    *,
    gateways: Sequence[str] = (GATEWAY,),
    kinds: Sequence[Kind] = tuple(Kind),
) -> list[Fault]:
    """`count` faults at random times, of random `kinds`, at random places."""
    faults = []
    for _ in range(count):
        kind = generator.choice(list(kinds))
        where = generator.choice(list(gateways if kind in _OF_GATEWAYS else workers))
        other = ""
        if (
            kind is Kind.CORRUPT or kind is Kind.NARROW
        ):  # of the control channel TLS takes care; bytes of blocks have checksums
            other = generator.choice([name for name in workers if name != where] or [where])
        elif kind in _BETWEEN:
            other = generator.choice([*gateways, *(name for name in workers if name != where)])
        faults.append(
            Fault(
                generator.uniform(0, within_s),
                kind,
                where,
                other,
                generator.choice([0.05, 0.3, 1.0, 4.0]),
                generator.choice(_AMOUNTS.get(kind, _BYTES)),
            )
        )
    return sorted(faults, key=lambda fault: fault.at_s)


async def play(cluster: SimCluster, faults: Sequence[Fault]) -> None:
    """Make the faults happen, each at its time; returns when all are over."""
    began_s = cluster.simulation.loop.time()

    async def one(fault: Fault) -> None:
        await asyncio.sleep(began_s + fault.at_s - cluster.simulation.loop.time())
        cluster.simulation.loop.trace("fault", fault.kind, fault.where, fault.other, fault.amount)
        await make(cluster, fault)

    async with asyncio.TaskGroup() as group:
        for fault in faults:
            group.create_task(one(fault))


async def make(cluster: SimCluster, fault: Fault) -> None:
    """Make one fault happen, and undo it after its time. To a worker that is down, nothing happens."""
    if fault.kind in _OF_GATEWAYS:
        await _restart_gateway(cluster, fault)
        return
    network, worker = cluster.simulation.network, cluster.workers[fault.where]
    match fault.kind:
        case Kind.CRASH | Kind.END | Kind.POWER:
            if worker.task is not None:
                await worker.crash(_CRASHES[fault.kind])
                await asyncio.sleep(fault.for_s)
                worker.restart()  # nothing else does, while it is crashed
        case Kind.ENGINE:
            worker.kill_engine()
        case Kind.CUT | Kind.CUT_ONE_WAY:
            network.partition(fault.where, fault.other, one_way=fault.kind is Kind.CUT_ONE_WAY)
            await asyncio.sleep(fault.for_s)
            network.heal(fault.where, fault.other)
        case Kind.BREAK:
            network.break_connections(fault.where, fault.other)
        case Kind.BREAK_LATER:
            network.break_connections(fault.where, fault.other, after_bytes=fault.amount)
        case Kind.CORRUPT:
            network.corrupt(fault.where, fault.other, after_bytes=fault.amount)
        case Kind.LATE:
            late = LinkProfile(latency_s=DATACENTRE.latency_s + fault.amount / 1000)
            await _with_link(cluster, fault, late)
        case Kind.NARROW:
            await _with_link(cluster, fault, LinkProfile(bytes_per_s=float(fault.amount)))
        case Kind.SLOW | Kind.FREEZE:
            await worker.slow_down(float(fault.amount) if fault.kind is Kind.SLOW else None, fault.for_s)
        case Kind.DRAIN:
            task = worker.task
            if task is not None and worker.supervisor is not None:
                worker.supervisor.drain()
                await asyncio.wait({task}, timeout=DRAIN_TIMEOUT_S)
                if worker.task is task:
                    await worker.stop()
                    await asyncio.sleep(fault.for_s)
                    if worker.task is None and not worker.crashed:
                        worker.start()


async def _restart_gateway(cluster: SimCluster, fault: Fault) -> None:
    one = cluster.gateways[fault.where]
    if one.gateway is not None:
        await one.crash(_CRASHES[fault.kind])
        await asyncio.sleep(fault.for_s)
        await one.restart()


async def _with_link(cluster: SimCluster, fault: Fault, profile: LinkProfile) -> None:
    network, ends = cluster.simulation.network, (fault.where, fault.other)
    for source, target in (ends, ends[::-1]):
        network.set_link(source, target, profile)
    await asyncio.sleep(fault.for_s)
    for source, target in (ends, ends[::-1]):
        network.set_link(source, target, DATACENTRE)


_CRASHES = {
    Kind.CRASH: Crash.RESET,
    Kind.END: Crash.END,
    Kind.POWER: Crash.SILENT,
    Kind.GATEWAY: Crash.RESET,
    Kind.GATEWAY_END: Crash.END,
    Kind.GATEWAY_POWER: Crash.SILENT,
}
