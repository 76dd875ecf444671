"""A whole cluster in one simulated run: gateways, workers with hash engines, and ways to hurt them.

In: the shape of the cluster. Out: the real gateways, supervisors, engines and transfers on simulated hosts,
and what must hold of them whatever happened. Only executors, network and launcher are simulated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import permutations

from headrace.cluster import Gateway, GatewayObserver
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.cluster.registry import Member
from headrace.config.engine import Connector
from headrace.engine import Engine
from headrace.protocol.engine_messages import PoolInfo
from headrace.protocol.handoff import Ticket
from headrace.protocol.messages import ExportOffered, FromWorker, Role
from headrace.protocol.requests import GenerateRequest
from headrace.sim.agent import SimAgent
from headrace.sim.hash_model import Expected
from headrace.sim.launcher import TaskLauncher
from headrace.sim.link import DATACENTRE, LinkProfile
from headrace.sim.network import Crash
from headrace.sim.shape import KEY, EngineShape, executor_of
from headrace.sim.simulation import Simulation
from headrace.worker import Supervisor, WorkerOptions, serve
from headrace.world import World

GATEWAY = "gateway"
GATEWAY_PORT = 7000
ENGINE_PORT = 7100
DATA_PORT = 7200
"""The same in each life of a worker, so that who comes with a ticket of a former life is answered."""


class SharedBytes:
    """An engine's memory as its supervisor opens it."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer

    def close(self) -> None:
        self.buffer = memoryview(b"")


class Violation(AssertionError):
    """What must hold did not; the text says what, of whom."""


@dataclass(frozen=True, slots=True)
class Leaked:
    """A ticket that somebody keeps who was not meant to use it, and whose prompt its blocks hold."""

    ticket: Ticket
    request: GenerateRequest


class LeakyGateway(Gateway):
    """The gateway, and tickets that come to it are written down elsewhere."""

    leaked: list[Leaked]

    def heard(self, member: Member, message: FromWorker) -> None:
        if isinstance(message, ExportOffered):
            accepted = self._ledger.of_leg(message.request_id)
            if accepted is not None:
                self.leaked.append(Leaked(message.ticket, accepted.request))
        super().heard(member, message)


@dataclass(eq=False)
class SimGateway:
    """One gateway on a host of its own. After a crash another one starts there, which knows nothing."""

    cluster: SimCluster
    name: str
    gateway: Gateway | None = None
    """None while its machine is down."""
    former: list[Gateway] = field(default_factory=list)
    """Those that crashed here."""

    @property
    def address(self) -> str:
        return f"{self.name}:{GATEWAY_PORT}"

    def build(self) -> Gateway:
        cluster = self.cluster
        world = cluster.simulation.world(self.name)
        with cluster.simulation.on(self.name):
            gateway = self.gateway = cluster.gateway_type(world, cluster.observer, cluster.options)
        if isinstance(gateway, LeakyGateway):
            gateway.leaked = cluster.leaked
        return gateway

    async def listen(self) -> None:
        """Start serving."""
        if self.gateway is not None:
            with self.cluster.simulation.on(self.name):
                await self.gateway.listen(self.address)

    async def stop(self) -> None:
        """End everything that runs there."""
        if self.gateway is not None:
            with self.cluster.simulation.on(self.name):
                await self.gateway.drain(0.0)

    async def crash(self, how: Crash = Crash.RESET) -> None:
        """The whole machine dies; the streams of its clients end."""
        gateway, self.gateway = self.gateway, None
        if gateway is not None:
            self.former.append(gateway)
            self.cluster.simulation.network.crash_host(self.name, how)
            with self.cluster.simulation.on(self.name):
                await gateway.drain(0.0)  # nothing that it says leaves the machine

    async def restart(self) -> None:
        """Bring a crashed machine back."""
        self.cluster.simulation.network.restart_host(self.name)
        self.build()
        await self.listen()


@dataclass(eq=False)
class SimWorker:
    """One worker on a host of its own."""

    cluster: SimCluster
    name: str
    role: Role
    engine: Engine | None = None
    """The engine that runs, or the last one."""
    supervisor: Supervisor | None = None
    task: asyncio.Task[None] | None = None
    engines: list[Engine] = field(default_factory=list)
    crashed: bool = False
    _launcher: TaskLauncher | None = None

    def start(self) -> None:
        """Start the worker on its host."""
        world = self.cluster.simulation.world(self.name)
        self._launcher = TaskLauncher(lambda address: self._live(world, address))
        options = WorkerOptions(
            worker_id=self.name,
            join=tuple(gateway.address for gateway in self.cluster.gateways.values()),
            role=self.role,
            data_address=f"{self.name}:{DATA_PORT}",
            lease_s=self.cluster.lease_s,
            connector=self.cluster.connector,
            check_reads=True,
            step_timeout_s=self.cluster.step_timeout_s,
        )
        with self.cluster.simulation.on(self.name):
            self.supervisor = Supervisor(world, options, self._launcher, f"{self.name}:{ENGINE_PORT}")
            self.task = asyncio.create_task(self.supervisor.run(), name=self.name)

    async def _live(self, world: World, address: str) -> None:
        """One engine, from start to end."""
        engine = self.engine = self.cluster.shape.build()
        self.engines.append(engine)
        executor = executor_of(engine)
        path = f"{self.name}/{len(self.engines)}"
        memory = executor.memory()
        self.cluster.simulation.memories[path] = SharedBytes(memory)
        info = self.cluster.shape.info(engine)
        pool = PoolInfo(path, memory.nbytes, executor.block_bytes, self.cluster.shape.block_size)
        try:
            await serve(world, address, engine, info, pool)
        finally:
            executor.close()

    def kill_engine(self) -> bool:
        """The engine's process dies, if one runs; its supervisor lives."""
        task = self._launcher.processes[-1].task if self._launcher and self._launcher.processes else None
        return task is not None and task.cancel()

    def lose_agent(self) -> bool:
        """What reads and shows this worker's blocks dies, if it stands; it stands again soon."""
        life = self.supervisor.life if self.supervisor is not None else None
        agent = life.agent if life is not None else None
        return isinstance(agent, SimAgent) and agent.kill()

    async def slow_down(self, factor: float | None, for_s: float) -> bool:
        """Let steps that begin within `for_s` take `factor` times as long; None: `for_s`, as if it froze.

        Returns whether there was one.
        """
        if self.engine is None:
            return False
        executor = executor_of(self.engine)
        before = executor.steps
        executor.step_s = for_s if factor is None else self.cluster.shape.step_s * factor
        await asyncio.sleep(for_s)
        executor.step_s = self.cluster.shape.step_s
        return executor.steps > before

    def drain(self) -> asyncio.Task[None] | None:
        """Ask a worker that runs to leave when it is done; returns what ends then."""
        if self.task is None or self.task.done() or self.supervisor is None:
            return None
        with self.cluster.simulation.on(self.name):
            self.supervisor.drain()
        return self.task

    async def crash(self, how: Crash = Crash.RESET) -> None:
        """The whole machine dies."""
        self.crashed = True
        self.cluster.simulation.network.crash_host(self.name, how)
        await self.stop()

    async def stop(self) -> None:
        """End what runs there, without a word."""
        tasks = [self.task] if self.task is not None else []
        if self._launcher is not None:
            tasks += [process.task for process in self._launcher.processes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.task = None

    def leftovers(self) -> list[str]:
        """What a worker that runs still holds or owes, in words."""
        if self.engine is None or self.task is None:
            return []
        scheduler = self.engine.scheduler
        pool = scheduler.cache.pool
        counts = {"held": pool.held, "leased": pool.leased, "quarantined": pool.quarantined}
        counts["sequences"] = len(list(scheduler.sequences()))
        if self.supervisor is not None and self.supervisor.life is not None:
            counts |= self.supervisor.life.open_legs()
        return [f"{self.name} has {what}: {count}" for what, count in counts.items() if count]

    def restart(self) -> None:
        """Bring a crashed machine back."""
        self.crashed = False
        self.cluster.simulation.network.restart_host(self.name)
        self.start()


class SimCluster:
    """Gateways and workers, from `start` to `stop`."""

    def __init__(
        self,
        simulation: Simulation,
        roles: dict[str, Role],
        *,
        shape: EngineShape | None = None,
        split: SplitPolicy | None = None,
        lease_s: float = 5.0,
        observer: GatewayObserver | None = None,
        gateways: int = 1,
        data_link: LinkProfile = DATACENTRE,
        connector: Connector = "tcp",
        options: GatewayOptions | None = None,
        gateway_type: type[Gateway] = LeakyGateway,
        step_timeout_s: float = 5.0,
    ) -> None:
        """`data_link` is what workers have between each other; `options` go before `split`."""
        self.simulation = simulation
        self.observer = observer
        self.shape = shape or EngineShape()
        self.lease_s = lease_s
        self.connector = connector
        self.step_timeout_s = step_timeout_s
        self.gateway_type = gateway_type
        self.options = options or GatewayOptions(
            cache_key=KEY,
            split=split or SplitPolicy(prompt_length_threshold=12),
            heartbeat_s=0.2,
            suspect_after_s=0.6,
            lapse_s=1.5,
            replay_timeout_s=20.0,
        )
        self.leaked: list[Leaked] = []
        """Tickets that were offered so far."""
        self.clock_rates: dict[str, float] = {}
        """Of hosts whose clocks are not right, when nothing else is wrong."""
        self.stepped: set[str] = set()
        """Hosts whose clocks have jumped."""
        self._expected: dict[tuple[str, int], Expected] = {}
        self._data_link = data_link
        self.gateways = {name: SimGateway(self, name) for name in self.gateway_names(gateways)}
        for gateway in self.gateways.values():
            gateway.build()
        self.workers = {name: SimWorker(self, name, role) for name, role in roles.items()}
        for name in roles:
            simulation.network.host(name)
        for one, other in permutations(roles, 2):
            simulation.network.set_link(one, other, data_link)

    def set_clocks(self, clocks: Mapping[str, tuple[float, float]]) -> None:
        """Let each of these hosts have a clock so many seconds ahead, and counting so many in a second."""
        for host, (ahead_s, rate) in clocks.items():
            self.clock_rates[host] = rate
            clock = self.simulation.network.clock(host)
            self.simulation.loop.set_clock(clock, ahead_s=ahead_s, rate=rate)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of any worker."""
        engines = (worker.engine for worker in self.workers.values() if worker.engine is not None)
        return executor_of(next(engines)).block_bytes

    def link(self, a: str, b: str) -> LinkProfile:
        """What lies between two hosts when nothing is wrong."""
        return self._data_link if a in self.workers and b in self.workers else DATACENTRE

    def on(self, gateway: Gateway) -> AbstractContextManager[None]:
        """Within the block, what runs reads the clock of a gateway's host, as its clients do."""
        owners = (one for one in self.gateways.values() if gateway is one.gateway or gateway in one.former)
        return self.simulation.on(next(owners).name)

    @staticmethod
    def gateway_names(count: int) -> list[str]:
        """What so many gateways are called."""
        return [GATEWAY, *(f"{GATEWAY}{number}" for number in range(2, count + 1))]

    async def start(self) -> None:
        """Start everything and wait until all workers are members."""
        for one in self.gateways.values():
            await one.listen()
        for worker in self.workers.values():
            worker.start()
        await self.complete()

    @property
    def gateway(self) -> Gateway:
        """The first gateway, which must be up."""
        gateway = self.gateways[GATEWAY].gateway
        if gateway is None:
            raise RuntimeError("the gateway is down")
        return gateway

    def live_gateways(self) -> dict[str, Gateway]:
        """Those that are up, by name."""
        return {name: one.gateway for name, one in self.gateways.items() if one.gateway is not None}

    async def complete(self, timeout_s: float = 60.0) -> None:
        """Wait until every gateway is up and knows every worker, and no other. Raises Violation."""
        try:
            async with asyncio.timeout(timeout_s):
                for one in self.gateways.values():
                    while one.gateway is None:
                        await asyncio.sleep(0.05)
                    await one.gateway.wait_ready(len(self.workers))
        except TimeoutError:
            known = {
                name: [member.worker_id for member in gateway.registry.live()]
                for name, gateway in self.live_gateways().items()
            }
            text = f"{timeout_s:g} s after the last fault, of {sorted(self.workers)} gateways know {known}"
            raise Violation(text) from None

    async def stop(self) -> None:
        for one in self.gateways.values():
            await one.stop()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))

    @property
    def steps(self) -> int:
        """Steps that the engines have run, those of engines that are gone included."""
        return sum(executor_of(engine).steps for worker in self.workers.values() for engine in worker.engines)

    def expected(self, request: GenerateRequest, index: int = 0) -> Expected:
        """What a sample produces when nothing disturbs it; requests of one name are the same."""
        name = request.request_id, index
        if name not in self._expected:
            self._expected[name] = self.shape.expected(request, index)
        return self._expected[name]

    async def settle(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing is open or held anywhere; raises Violation naming what still is."""
        deadline = self.simulation.loop.now + timeout_s
        while (left := self.leftovers()) and self.simulation.loop.now < deadline:
            await asyncio.sleep(0.05)
        if left:
            raise Violation(f"after {timeout_s:g} s there is still: {'; '.join(left)}")

    def leftovers(self) -> list[str]:
        """What is open, held or owed anywhere, in words."""
        self.check()
        found = []
        for name, one in self.gateways.items():
            for gateway in (*([one.gateway] if one.gateway is not None else ()), *one.former):
                if gateway.open_samples:
                    found.append(f"{name} has {gateway.open_samples} open samples")
                found += [
                    f"the books of {name} for {member.worker_id} have {len(member.legs)} legs, "
                    f"{member.open_samples} samples, {member.exports} exports, "
                    f"{len(member.outstanding)} prompts"
                    for member in gateway.registry
                    if member.legs or member.open_samples or member.exports or member.outstanding
                ]
        for worker in self.workers.values():
            found += worker.leftovers()
        return found

    def check(self) -> None:
        """Raise Violation where the books of a block pool do not balance, which they must at any time."""
        for worker in self.workers.values():
            if worker.engine is not None:
                try:
                    worker.engine.scheduler.cache.pool.check()
                except RuntimeError as error:
                    raise Violation(f"the blocks of {worker.name}: {error}") from error
