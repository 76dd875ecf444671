"""One standard life of a cluster: drawn from a seed, lived under faults, checked to the end.

In: a seed, and perhaps another list of faults. Out: a `Report`, or an exception that says which promise was
broken. Whatever breaks, every sample ends once, says nothing wrong, nothing is left, and everybody is back.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.protocol.messages import Role
from headrace.sim.cluster import EngineShape, SimCluster, Violation
from headrace.sim.faults import Fault, Kind, draw, play
from headrace.sim.load import Load, draw_request
from headrace.sim.network import WINDOW_BYTES
from headrace.sim.simulation import Simulation, run

REQUESTS = 80
FAULTS = 6
LOAD_S = 6.0
LOOK_S = 0.1
"""Between two looks at all block pools."""
RECOVERY_S = 30.0
"""Within which everybody is a member again when the last fault is over."""

_P, _D, _B = Role.PREFILL, Role.DECODE, Role.BOTH
CLUSTERS: tuple[dict[str, Role], ...] = (
    {"p": _P, "d": _D},
    {"p": _P, "d1": _D, "d2": _D},
    {"p1": _P, "p2": _P, "d1": _D, "d2": _D},
    {"b1": _B, "b2": _B, "b3": _B},
    {"p": _P, "b": _B, "d": _D},
    {"p1": _P, "p2": _P, "d1": _D, "d2": _D, "d3": _D, "b": _B},
)
MAX_NUM_SEQS = (2, 3, 6)
NUM_BLOCKS = (64, 80, 200)
LEASES_S = (0.2, 5.0)
WINDOWS_BYTES = (512, WINDOW_BYTES)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one life is made of."""

    roles: dict[str, Role]
    gateways: int
    shape: EngineShape
    lease_s: float
    window_bytes: int
    """Of a connection: with few, a transfer reads and writes blocks for as long as its link is slow."""
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a life that broke no promise."""

    seed: int
    trace_hash: str
    endings: Counter[str]
    """Samples by how they ended; `left` are those whose client left."""
    faults: Counter[str]
    steps: int
    virtual_s: float


def plan(
    seed: int,
    *,
    kinds: Sequence[Kind] = tuple(Kind),
    clusters: Sequence[dict[str, Role]] = CLUSTERS,
    count: int = FAULTS,
) -> Plan:
    """The life of a seed, with `count` faults of these `kinds`, in one of `clusters`."""
    chance = random.Random(seed)
    roles = chance.choice(list(clusters))
    gateways = chance.choice([1, 1, 2])
    shape = EngineShape(max_num_seqs=chance.choice(MAX_NUM_SEQS), num_blocks=chance.choice(NUM_BLOCKS))
    lease_s, window_bytes = chance.choice(LEASES_S), chance.choice(WINDOWS_BYTES)
    names = SimCluster.gateway_names(gateways)
    faults = draw(chance, list(roles), count, LOAD_S, gateways=names, kinds=kinds) if kinds else []
    return Plan(roles, gateways, shape, lease_s, window_bytes, tuple(faults))


def live(seed: int, what: Plan | None = None) -> Report:
    """Live the life of a seed. Raises what breaks: Violation, or an error that nobody foresaw."""
    lived = what if what is not None else plan(seed)
    endings: Counter[str] = Counter()
    steps = 0

    async def main(simulation: Simulation) -> None:
        nonlocal endings, steps
        cluster = SimCluster(
            simulation, lived.roles, shape=lived.shape, lease_s=lived.lease_s, gateways=lived.gateways
        )
        orderly = all(fault.kind in (Kind.DRAIN, Kind.SLOW) for fault in lived.faults)
        load = Load(cluster, LOAD_S, orderly=orderly)
        await cluster.start()
        watching = asyncio.create_task(_watch(cluster), name="watch")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(play(cluster, lived.faults))
                for number in range(REQUESTS):
                    group.create_task(load.client(random.Random(f"{seed} {number}"), number))
            simulation.network.disarm()
            await cluster.complete(RECOVERY_S)
            await cluster.settle()
            for number, gateway in enumerate(cluster.live_gateways().values(), REQUESTS):
                before = load.endings["stop"] + load.endings["length"]
                request = draw_request(random.Random(f"{seed} {number}"), number)
                await load.ask(gateway, request)
                if load.endings["stop"] + load.endings["length"] != before + request.sampling.n:
                    raise Violation(f"after all faults {request.request_id} did not come to its end")
            await cluster.settle()
        finally:
            endings = load.endings
            steps = cluster.steps
            watching.cancel()
            await asyncio.wait({watching})
            await cluster.stop()
        if not watching.cancelled():
            watching.result()  # raises what it saw

    try:
        outcome = run(
            main,
            seed=seed,
            window_bytes=lived.window_bytes,
            max_virtual_s=200.0,
            max_callbacks=5_000_000,
        )
    except BaseExceptionGroup as group:
        raise first_of(group) from group
    kinds = Counter(str(fault.kind) for fault in lived.faults)
    return Report(seed, outcome.trace_hash, endings, kinds, steps, outcome.virtual_s)


async def _watch(cluster: SimCluster) -> None:
    """Look at the block pools again and again."""
    while True:
        cluster.check()
        await asyncio.sleep(LOOK_S)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group of groups, with the group's notes."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        notes, error = getattr(error, "__notes__", []), error.exceptions[0]
        for note in notes:
            error.add_note(note)
    return error
