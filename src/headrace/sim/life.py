"""One standard life of a cluster: drawn from a seed, lived under faults, checked to the end.

In: a seed, and perhaps another list of faults. Out: a `Report`, or an exception that says which promise was
broken. Whatever breaks, every sample ends once, says nothing wrong, nothing is left, and everybody is back.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.config.engine import Connector
from headrace.protocol.messages import Role
from headrace.sim.cluster import SimCluster, Violation
from headrace.sim.faults import Fault, Kind, draw
from headrace.sim.link import DATACENTRE, LinkProfile
from headrace.sim.load import Load
from headrace.sim.mishaps import Mishaps
from headrace.sim.network import WINDOW_BYTES
from headrace.sim.shape import EngineShape
from headrace.sim.simulation import Simulation, run

REQUESTS = 40
FAULTS = 10
ACTING = 6
STEPS = 2000
"""A standard life has at least so many accepted requests, drawn faults, faults that met something, and steps
of engines, each of which computes a batch of tokens on one worker."""
LOAD_S = 6.0
"""Within which all faults begin."""
LONGEST_LOAD_S = 120.0
"""Within which a life must have had what a standard one has."""
LOOK_S = 0.1
"""Between two looks at all block pools."""
RECOVERY_S = 30.0
"""Within which everybody is a member again when the last fault is over."""

Computes = Literal["hash", "torch"]
"""What engines run on: hashes, or torch with a tiny model."""

SPARE_KINDS = (Kind.LATE, Kind.CLOCK_STEP, Kind.ENGINE, Kind.CANCEL)
"""Faults that nearly always meet something."""

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
MAX_WAITING = (6, 12, 30)
LEASES_S = (0.2, 5.0)
WINDOWS_BYTES = (512, WINDOW_BYTES)
DATA_LINKS = (DATACENTRE, LinkProfile(bytes_per_s=50_000), LinkProfile(bytes_per_s=5_000))
"""Between workers; over the slowest a long prompt's blocks take as long as a short lease lasts."""
CONNECTORS: tuple[Connector, ...] = ("tcp", "auto")
CLOCK_RATE = 200e-6
"""How far a host's clock may be from one second a second when nothing is wrong with it."""
CLOCK_AHEAD_S = 1e5


@dataclass(frozen=True, slots=True)
class Plan:
    """What one life is made of."""

    roles: dict[str, Role]
    gateways: int
    shape: EngineShape
    lease_s: float
    window_bytes: int
    """Of a connection: with few, a transfer reads and writes blocks for as long as its link is slow."""
    data_link: LinkProfile
    clocks: dict[str, tuple[float, float]]
    """For each host, how many seconds its clock is ahead, and how many it counts in a second."""
    faults: tuple[Fault, ...]
    steps: int = STEPS
    """How long the load goes on at least."""
    acting: int = 0
    """How many faults must meet something."""
    connector: Connector = "tcp"
    """How KV blocks move between the workers."""
    spare: tuple[Fault, ...] = ()
    """Happen one after another when the others are over and too few of them have met something."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a life that broke no promise."""

    seed: int
    trace_hash: str
    endings: Counter[str]
    """Samples by how they ended; `left` are those whose client left."""
    faults: Counter[str]
    """Those that happened, by kind."""
    acted: Counter[str]
    """Those that met something, by kind."""
    requests: int
    """Those that were accepted."""
    steps: int
    """Of all engines, while clients came."""
    virtual_s: float
    again: bool = False
    """Whether it was lived twice, and was the same."""


def plan(
    seed: int,
    *,
    kinds: Sequence[Kind] = tuple(Kind),
    clusters: Sequence[dict[str, Role]] = CLUSTERS,
    count: int = FAULTS,
    executor: Computes = "hash",
    connector: Connector | None = None,
) -> Plan:
    """The life of a seed, with `count` faults of these `kinds`, in one of `clusters`.

    Without `connector`, the seed draws how blocks move.
    """
    chance = random.Random(seed)
    roles = chance.choice(list(clusters))
    gateways = chance.choice([1, 1, 2])
    shape = _shape_type(executor)(
        max_num_seqs=chance.choice(MAX_NUM_SEQS),
        num_blocks=chance.choice(NUM_BLOCKS),
        max_waiting=chance.choice(MAX_WAITING),
    )
    lease_s, window_bytes = chance.choice(LEASES_S), chance.choice(WINDOWS_BYTES)
    data_link = chance.choice(DATA_LINKS)
    names = SimCluster.gateway_names(gateways)
    clocks = {
        host: (chance.uniform(0, CLOCK_AHEAD_S), 1 + chance.uniform(-CLOCK_RATE, CLOCK_RATE))
        for host in (*names, *roles)
    }
    drawn_connector = random.Random(f"{seed}, connector").choice(CONNECTORS)
    moves = drawn_connector if connector is None else connector
    drawn = [kind for kind in kinds if kind is not Kind.AGENT or moves != "tcp"]
    faults = tuple(draw(chance, roles, count, LOAD_S, gateways=names, kinds=drawn))
    acting = ACTING if count >= FAULTS and set(kinds) == set(Kind) else 0
    spare = tuple(draw(chance, roles, 2 * acting, 0.0, gateways=names, kinds=SPARE_KINDS))
    return Plan(
        roles,
        gateways,
        shape,
        lease_s,
        window_bytes,
        data_link,
        clocks,
        faults,
        acting=acting,
        spare=spare,
        connector=moves,
    )


def _shape_type(executor: Computes) -> type[EngineShape]:
    if executor == "torch":
        from headrace.sim.torch_shape import TorchShape  # which loads torch

        return TorchShape
    return EngineShape


@dataclass(slots=True)
class _Lived:
    """What is known of a life while it is lived."""

    endings: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    acted: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    steps: int = 0


def live(seed: int, what: Plan | None = None) -> Report:
    """Live the life of a seed. Raises what breaks: Violation, or an error that nobody foresaw."""
    planned = what if what is not None else plan(seed)
    lived = _Lived()
    try:
        outcome = run(
            lambda simulation: _live(simulation, seed, planned, lived),
            seed=seed,
            window_bytes=planned.window_bytes,
            max_virtual_s=400.0,
            max_callbacks=5_000_000,
        )
    except BaseExceptionGroup as group:
        raise first_of(group) from group
    return Report(
        seed,
        outcome.trace_hash,
        lived.endings,
        lived.made,
        lived.acted,
        lived.requests,
        lived.steps,
        outcome.virtual_s,
    )


async def _live(simulation: Simulation, seed: int, planned: Plan, lived: _Lived) -> None:
    cluster = SimCluster(
        simulation,
        planned.roles,
        shape=planned.shape,
        lease_s=planned.lease_s,
        gateways=planned.gateways,
        data_link=planned.data_link,
        connector=planned.connector,
    )
    cluster.set_clocks(planned.clocks)
    orderly = all(fault.kind in (Kind.DRAIN, Kind.SLOW) for fault in planned.faults)
    load = Load(cluster, seed, orderly=orderly)
    mishaps = Mishaps(cluster, load)
    lived.endings, lived.made, lived.acted = load.endings, mishaps.made, mishaps.acted
    await cluster.start()
    watching = asyncio.create_task(_watch(cluster), name="watch")
    try:
        await _load(cluster, planned, load, mishaps)
        lived.requests, lived.steps = load.accepted, cluster.steps
        simulation.network.disarm()
        await cluster.complete(RECOVERY_S)
        await cluster.settle()
        for gateway in cluster.live_gateways().values():
            before = load.endings["stop"] + load.endings["length"]
            request, _ = load.next_request()
            await load.ask(gateway, request)
            if load.endings["stop"] + load.endings["length"] != before + request.sampling.n:
                raise Violation(f"after all faults {request.request_id} did not come to its end")
        await cluster.settle()
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        await cluster.stop()
    if not watching.cancelled():
        watching.result()  # raises what it saw


async def _load(cluster: SimCluster, planned: Plan, load: Load, mishaps: Mishaps) -> None:
    """Let clients come until all faults are over and all has happened that makes a life a standard one."""
    loop = cluster.simulation.loop
    latest_s = loop.now + LONGEST_LOAD_S
    async with asyncio.TaskGroup() as group:
        playing = group.create_task(_play(planned, mishaps))

        def missing() -> str:
            acted = mishaps.acted.total()
            if load.accepted < REQUESTS or cluster.steps < planned.steps or acted < planned.acting:
                return f"{load.accepted} requests, {cluster.steps} steps and {acted} faults that acted"
            return ""

        await load.run(lambda: loop.now > latest_s or (playing.done() and not missing()))
    if found := missing():
        raise Violation(f"within {LONGEST_LOAD_S:g} s of load there were only {found}")


async def _play(planned: Plan, mishaps: Mishaps) -> None:
    await mishaps.play(planned.faults)
    for fault in planned.spare:
        if mishaps.acted.total() >= planned.acting:
            return
        await mishaps.make(fault)


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
