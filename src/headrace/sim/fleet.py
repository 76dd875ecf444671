"""A whole cluster on modelled hardware, in virtual time, under a trace: what planning looks at.

In: arrivals, the sizes of the pools, the cost of a step, and the gateway's options. Out: a `FleetResult`. The
gateway, supervisors, engine loops, schedulers, block pools and prefix caches are the real ones, as is every
message between them; executors (`modelled_executor.py`) and the network (`planning.py`) take modelled time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

from headrace.cluster import Gateway, GatewayObserver
from headrace.cluster.journey import Journey
from headrace.cluster.observer import Ending
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.engine import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import GenerateRequest
from headrace.sim.cluster import SimCluster
from headrace.sim.cost import StepCost
from headrace.sim.fleet_result import FleetResult, Served, WorkerUse
from headrace.sim.flows import Adapters
from headrace.sim.ideal_cache import IdealCache
from headrace.sim.loop import VirtualLoop
from headrace.sim.modelled_executor import ModelledExecutor, ModelledShape
from headrace.sim.network import Wiring
from headrace.sim.planning import CONTROL, WITHIN, planned_wiring
from headrace.sim.shape import KEY
from headrace.sim.simulation import Simulation, run
from headrace.sim.trace import Arrival

PLANNED = GatewayOptions(
    split=SplitPolicy(prompt_length_threshold=512),
    heartbeat_s=5.0,
    suspect_after_s=15.0,
    lapse_s=50.0,
)
"""Heartbeats are rarer than in production: nobody dies here, and each costs as much as a token."""

CALLBACKS_PER_COLLECTION = 2_000_000
"""A fleet makes few cycles of garbage, and looking for them takes longer the more its caches hold."""

STUCK_AFTER_S = 3600.0
"""A request that has not ended so long after the last arrival never will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """The cluster. Lengths in tokens."""

    cost: StepCost
    prefill: int = 0
    decode: int = 0
    both: int = 0
    """Workers of each role."""
    cache_tokens: int = 1_000_000
    """That each worker's KV cache holds."""
    block_size: int = 512
    max_model_len: int = 131_072
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_waiting: int = 100_000
    """Sequences that may wait at a worker; so many that none of a trace is refused for it."""
    reuse_prefix: bool = True
    """Whether prompts share what they begin with."""
    stride: int = 4
    """Decode steps of a worker that are run as one: the simulation is quicker, and what comes to a worker
    waits up to so many steps. 1 is exact."""
    nic_bytes_per_s: float = 45e9
    """Of each worker, in each direction, for KV blocks."""
    ideal_cache: bool = False
    """Whether all workers have one cache, of the size of all of theirs; see `ideal_cache.py`."""
    gateway: GatewayOptions = PLANNED
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decode + self.both < 1:
            raise ValueError("no worker decodes: ask for one in decode, or in both")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 step, got {self.stride}")
        if self.cache_tokens < self.block_size:
            raise ValueError(f"a cache of {self.cache_tokens} tokens holds no block of {self.block_size}")

    def roles(self) -> dict[str, Role]:
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.BOTH: self.both}
        return {f"{role}{i}": role for role, count in counts.items() for i in range(count)}

    def shape(self) -> ModelledShape:
        """What each of its engines is like; those of one cluster have one shape."""
        blocks = self.cache_tokens // self.block_size
        if self.ideal_cache:
            blocks *= self.prefill + self.decode + self.both
        return ModelledShape(
            ideal=IdealCache() if self.ideal_cache else None,
            cost=self.cost,
            stride=self.stride,
            max_model_len=self.max_model_len,
            vocab_size=self.cost.shape.vocab,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max(self.max_num_batched_tokens, self.max_num_seqs),
            max_waiting=self.max_waiting,
            reuse_prefix=self.reuse_prefix,
            num_blocks=blocks,
            block_size=self.block_size,
        )


class _Endings(GatewayObserver):
    """Tells each client when its request is over, so that it need not look at every token."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Future[None]] = {}

    def ended(self, ending: Ending) -> None:
        over = self.waiting.pop(ending.request.request_id, None)
        if over is not None and not over.done():
            over.set_result(None)


class Fleet:
    """A cluster that runs, and what its clients have seen. For one run."""

    def __init__(
        self, simulation: Simulation, options: FleetOptions, adapters: Adapters, observer: _Endings
    ) -> None:
        self.simulation = simulation
        self.options = options
        self.adapters = adapters
        self.served: dict[str, Served] = {}
        """By name, those whose requests have ended."""
        self.heard: Callable[[int], None] = lambda ended: None
        """Told with each ending how many have ended."""
        self.explain: Collection[str] = ()
        """Whose journeys are kept."""
        self.journeys: list[Journey] = []
        self._endings = observer
        self.cluster = SimCluster(
            simulation,
            options.roles(),
            shape=options.shape(),
            lease_s=600.0,
            observer=observer,
            data_link=CONTROL,
            options=replace(options.gateway, cache_key=KEY),
            gateway_type=Gateway,
            step_timeout_s=600.0,
        )

    @property
    def gateway(self) -> Gateway:
        return self.cluster.gateway

    async def play(self, arrivals: Sequence[Arrival]) -> float:
        """Send every request when it is due and see all of them end; returns when the first was due."""
        loop = self.simulation.loop
        began_s = loop.now
        clients = []
        for arrival in arrivals:
            if (wait_s := began_s + arrival.at_s - loop.now) > 0:
                await asyncio.sleep(wait_s)
            clients.append(loop.create_task(self._client(arrival)))
        async with asyncio.timeout(STUCK_AFTER_S):
            for client in clients:
                await client
        return began_s

    async def _client(self, arrival: Arrival) -> None:
        now = self.simulation.loop.now
        request = arrival.request(self.options.cost.shape.vocab)
        asked = Served(arrival.name, arrival.at_s, len(request.prompt), "")
        try:
            self.served[arrival.name] = await self._ask(request, asked, now)
        except RequestRefused as refused:
            self.served[arrival.name] = replace(asked, ended=str(refused.error.code))
        if arrival.name in self.explain:
            self.journeys += self.gateway.journeys.of(arrival.name)
        self.heard(len(self.served))

    async def _ask(self, request: GenerateRequest, asked: Served, began_s: float) -> Served:
        loop, name = self.simulation.loop, request.request_id
        over = self._endings.waiting[name] = loop.create_future()
        try:
            stream = self.gateway.submit(request)
        except BaseException:
            del self._endings.waiting[name]
            raise
        ttft_s, cached, count, ended = math.inf, 0, 0, ""
        async for outputs in stream:
            for output in outputs:
                if output.tokens and count == 0:
                    ttft_s = loop.now - began_s
                count += len(output.tokens)
                cached = max(cached, output.cached_tokens or 0)
                if output.finish is not None:
                    ended = str(output.finish.reason)
            if not ended:
                await over  # what comes until then is one piece
        home, prefill = self._where(name)
        return replace(
            asked,
            ended=ended,
            output_tokens=count,
            cached_tokens=cached,
            ttft_s=ttft_s,
            e2e_s=loop.now - began_s,
            home=home,
            prefill=prefill,
        )

    def _where(self, name: str) -> tuple[str, str]:
        """Who decoded a request, and who prefilled it for that worker, as its journey tells."""
        home = prefill = ""
        for journey in self.gateway.journeys.of(name)[:1]:
            for entry in journey.entries:
                if entry.what == "placed":
                    home, prefill = entry.worker, ""
                elif entry.what == "prefill placed":
                    prefill = entry.worker
        return home, prefill

    def uses(self) -> dict[str, WorkerUse]:
        """What each worker did so far."""
        found = {}
        for name, worker in self.cluster.workers.items():
            engine = worker.engine
            if engine is None or not isinstance(engine.executor, ModelledExecutor):
                raise RuntimeError(f"{name} has no engine")
            counters, executor = engine.scheduler.counters, engine.executor
            found[name] = WorkerUse(
                role=worker.role,
                busy_s=executor.busy_s,
                steps=executor.steps,
                tokens=executor.tokens,
                sent_bytes=self.adapters.carried_bytes[name],
                preemptions=counters.preemptions,
                prefix_queries=counters.prefix_queries,
                prefix_hits=counters.prefix_hits,
            )
        return found


def simulate(
    arrivals: Sequence[Arrival],
    options: FleetOptions,
    *,
    prepare: Callable[[Fleet], Awaitable[None]] | None = None,
    heard: Callable[[int], None] = lambda ended: None,
    explain: Collection[str] = (),
) -> FleetResult:
    """Serve these arrivals, which are in order of time, from an empty cluster to the last ending.

    `prepare` is called when all workers are members, before the first arrival; `heard` with each ending, with
    how many have ended. Of the requests that `explain` names the result has the journeys. Raises
    SimulationError where the cluster cannot go on, TimeoutError where a request never ends.
    """
    began_cpu_s = time.process_time()
    wired: list[Adapters] = []

    def wiring(loop: VirtualLoop) -> Wiring:
        wired.append(Adapters(loop, options.nic_bytes_per_s))
        return planned_wiring(wired[0], options.cost.shape.kv_bytes * options.block_size)

    async def main(simulation: Simulation) -> tuple[Fleet, float, dict[str, WorkerUse]]:
        fleet = Fleet(simulation, options, wired[0], _Endings())
        fleet.heard, fleet.explain = heard, explain
        await fleet.cluster.start()
        if prepare is not None:
            await prepare(fleet)
        began_s = await fleet.play(arrivals)
        duration_s, uses = simulation.loop.now - began_s, fleet.uses()
        await fleet.cluster.stop()
        return fleet, duration_s, uses

    outcome = run(
        main,
        seed=options.seed,
        link=CONTROL,
        loopback=WITHIN,
        wiring=wiring,
        callbacks_per_collection=CALLBACKS_PER_COLLECTION,
    )
    fleet, duration_s, uses = outcome.result
    return FleetResult(
        requests=tuple(fleet.served[arrival.name] for arrival in arrivals),
        workers=uses,
        duration_s=duration_s,
        journeys=tuple(fleet.journeys),
        trace_hash=outcome.trace_hash,
        cpu_s=time.process_time() - began_cpu_s,
    )
