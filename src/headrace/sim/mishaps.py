"""How each fault is made to happen to a simulated cluster, and undone after its time.

In: a cluster, its clients, and a list of faults. Out: what happened, and of which kinds it met something: a
fault acts when a worker was up to be killed, a connection there to be broken, a step under way to be slow.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.protocol.handoff import BlockSpan, Cause, Reserved
from headrace.sim.cluster import Leaked, SimCluster, Violation
from headrace.sim.faults import Fault, Kind
from headrace.sim.link import DATACENTRE, LinkProfile
from headrace.sim.network import Crash
from headrace.transfer import Patience, Pool, TransferFailed, fetch

DRAIN_TIMEOUT_S = 20.0
STALE_EVERY_S, LONGEST_STALE_S = 0.1, 1.0
STRANGER = "stranger"
"""The host of whoever comes with a ticket that was not given to him."""


class Clients(Protocol):
    """Who asks."""

    def flood(self, gateway: str, count: int) -> int:
        """Ask so many short things at once; returns how many were refused for want of room."""


class Mishaps:
    """All faults of one life."""

    def __init__(self, cluster: SimCluster, clients: Clients) -> None:
        self._cluster = cluster
        self._clients = clients
        self.made: Counter[str] = Counter()
        """Faults by kind."""
        self.acted: Counter[str] = Counter()
        """Those that met something."""

    async def play(self, faults: Sequence[Fault]) -> None:
        """Make the faults happen, each at its time; returns when all are over."""
        loop = self._cluster.simulation.loop
        began_s = loop.now

        async def one(fault: Fault) -> None:
            await asyncio.sleep(began_s + fault.at_s - loop.now)
            loop.trace("fault", fault.kind, fault.where, fault.other, fault.amount)
            await self.make(fault)

        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(one(fault))

    async def make(self, fault: Fault) -> None:
        """Make one fault happen, and undo it after its time."""
        self.made[str(fault.kind)] += 1
        match fault.kind:
            case Kind.BREAK | Kind.BREAK_LATER | Kind.BREAK_PULL | Kind.CORRUPT:
                self._arm(fault, lambda: self._count(fault))
                return
            case Kind.CRASH | Kind.END | Kind.POWER:
                acted = await self._crash_worker(fault)
            case Kind.ENGINE:
                acted = self._cluster.workers[fault.where].kill_engine()
            case Kind.AGENT:
                acted = self._cluster.workers[fault.where].lose_agent()
            case Kind.SLOW | Kind.FREEZE:
                factor = float(fault.amount) if fault.kind is Kind.SLOW else None
                acted = await self._cluster.workers[fault.where].slow_down(factor, fault.for_s)
            case Kind.DRAIN:
                acted = await self._drain(fault)
            case Kind.CUT | Kind.CUT_ONE_WAY:
                acted = await self._cut(fault)
            case Kind.LATE:
                late = LinkProfile(latency_s=DATACENTRE.latency_s + fault.amount / 1000)
                acted = await self._with_link(fault, late)
            case Kind.NARROW:
                acted = await self._with_link(fault, LinkProfile(bytes_per_s=float(fault.amount)))
            case Kind.GATEWAY | Kind.GATEWAY_END | Kind.GATEWAY_POWER:
                acted = await self._crash_gateway(fault)
            case Kind.CLOCK_RATE | Kind.CLOCK_STEP:
                acted = await self._put_clock_wrong(fault)
            case Kind.CANCEL:
                acted = self._cancel_all(fault)
            case Kind.FULL:
                acted = self._clients.flood(fault.where, fault.amount) > 0
            case Kind.STALE:
                acted = await self._come_again(fault)
        if acted:
            self._count(fault)

    def _count(self, fault: Fault) -> None:
        self.acted[str(fault.kind)] += 1

    # ---- machines ------------------------------------------------------------------------------------

    async def _crash_worker(self, fault: Fault) -> bool:
        worker = self._cluster.workers[fault.where]
        if worker.task is None:
            return False
        await worker.crash(_CRASHES[fault.kind])
        await asyncio.sleep(fault.for_s)
        worker.restart()  # nothing else does, while it is crashed
        return True

    async def _crash_gateway(self, fault: Fault) -> bool:
        one = self._cluster.gateways[fault.where]
        if one.gateway is None:
            return False
        await one.crash(_CRASHES[fault.kind])
        await asyncio.sleep(fault.for_s)
        await one.restart()
        return True

    async def _drain(self, fault: Fault) -> bool:
        worker = self._cluster.workers[fault.where]
        task = worker.drain()
        if task is None:
            return False
        await asyncio.wait({task}, timeout=DRAIN_TIMEOUT_S)
        if worker.task is task:
            await worker.stop()
            await asyncio.sleep(fault.for_s)
            if worker.task is None and not worker.crashed:
                worker.start()
        return True

    async def _put_clock_wrong(self, fault: Fault) -> bool:
        loop, host = self._cluster.simulation.loop, fault.where
        clock, rate = self._cluster.simulation.network.clock(host), self._cluster.clock_rates.get(host, 1.0)
        if fault.kind is Kind.CLOCK_STEP:
            self._cluster.stepped.add(host)
            loop.set_clock(clock, ahead_s=fault.amount / 1000, rate=clock.rate)
        else:
            loop.set_clock(clock, rate=rate * fault.amount / 1000)
            await asyncio.sleep(fault.for_s)
            loop.set_clock(clock, rate=rate)
        return True

    # ---- links ---------------------------------------------------------------------------------------

    def _arm(self, fault: Fault, acted: Callable[[], None]) -> None:
        network, ends = self._cluster.simulation.network, (fault.where, fault.other)
        if fault.kind is Kind.CORRUPT:
            network.corrupt(*ends, after_bytes=fault.amount, acted=acted)
        else:
            after_bytes = None if fault.kind is Kind.BREAK else fault.amount
            network.break_connections(*ends, after_bytes=after_bytes, acted=acted)

    async def _cut(self, fault: Fault) -> bool:
        network, ends = self._cluster.simulation.network, (fault.where, fault.other)
        _, before = network.packets(*ends)
        network.partition(*ends, one_way=fault.kind is Kind.CUT_ONE_WAY)
        await asyncio.sleep(fault.for_s)
        network.heal(*ends)
        return network.packets(*ends)[1] > before

    async def _with_link(self, fault: Fault, profile: LinkProfile) -> bool:
        network, ends = self._cluster.simulation.network, (fault.where, fault.other)
        before, _ = network.packets(*ends)
        for pair in (ends, ends[::-1]):
            network.set_link(*pair, profile)
        await asyncio.sleep(fault.for_s)
        for pair in (ends, ends[::-1]):
            network.set_link(*pair, self._cluster.link(*pair))
        return network.packets(*ends)[0] > before

    # ---- requests ------------------------------------------------------------------------------------

    def _cancel_all(self, fault: Fault) -> bool:
        gateway, loop = self._cluster.gateways[fault.where].gateway, self._cluster.simulation.loop
        names = [journey.request_id for journey in gateway.unended()] if gateway is not None else []
        if gateway is not None:
            with self._cluster.simulation.on(fault.where):
                for number, name in enumerate(names, 1):
                    loop.call_after(fault.amount * number, gateway.cancel, name)
        return bool(names)

    async def _come_again(self, fault: Fault) -> bool:
        """Pull what tickets were for, again and again; what their source says are the blocks must be them."""
        loop = self._cluster.simulation.loop
        until_s = loop.now + min(fault.for_s, LONGEST_STALE_S)
        acted = False
        while True:
            leaked = [one for one in self._cluster.leaked if one.ticket.worker_id == fault.where]
            async with asyncio.TaskGroup() as group:
                pulls = [group.create_task(self._pull(one)) for one in leaked[-fault.amount :]]
            acted = acted or any(pull.result() for pull in pulls)
            if loop.now >= until_s:
                return acted
            await asyncio.sleep(STALE_EVERY_S)

    async def _pull(self, leaked: Leaked) -> bool:
        cluster, ticket, size = self._cluster, leaked.ticket, self._cluster.shape.block_size
        count = -(-ticket.prompt_tokens // size)
        block_bytes = cluster.block_bytes
        memory = memoryview(bytearray(count * block_bytes))
        pool = Pool(memory, block_bytes, size, ticket.kv_layout)
        blocks = [BlockSpan(0, 0, list(range(count)))]
        reserved = Reserved("stale", ticket.prompt_tokens, 0, blocks, ticket.identities)
        patience = Patience()
        patience.source_is_done()
        with cluster.simulation.on(STRANGER):
            try:
                await fetch(cluster.simulation.world(STRANGER), pool, reserved, ticket, patience)
            except TransferFailed as failure:
                return failure.cause is not Cause.UNREACHABLE
        if not cluster.shape.holds(memory, leaked.request, ticket.prompt_tokens):
            raise Violation(
                f"{ticket.worker_id} gave other blocks for a ticket of {leaked.request.request_id}, "
                "and confirmed them"
            )
        return True


_CRASHES = {
    Kind.CRASH: Crash.RESET,
    Kind.END: Crash.END,
    Kind.POWER: Crash.SILENT,
    Kind.GATEWAY: Crash.RESET,
    Kind.GATEWAY_END: Crash.END,
    Kind.GATEWAY_POWER: Crash.SILENT,
}
