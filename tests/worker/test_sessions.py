"""A worker's membership when its gateway goes without a word, or is away for long."""

from __future__ import annotations

import asyncio

from headrace.cluster.options import GatewayOptions
from headrace.protocol.messages import Role
from headrace.sim import Crash, Simulation, run
from headrace.sim.cluster import GATEWAY, SimCluster

TWO_HEARTBEATS_S = 2 * GatewayOptions().heartbeat_s


def test_a_welcome_that_was_lost_with_its_gateway_is_not_waited_for() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"w": Role.BOTH})
        gateway = cluster.gateways[GATEWAY]
        await cluster.gateway.listen(gateway.address)
        cluster.workers["w"].start()
        while cluster.gateway.registry.get("w") is None:
            await cluster.gateway.wait_changed()
        simulation.network.partition(GATEWAY, "w", one_way=True)  # the welcome is on its way
        await asyncio.sleep(0.01)
        await gateway.crash(Crash.SILENT)
        simulation.network.heal(GATEWAY, "w")
        await gateway.restart()
        await cluster.complete(TWO_HEARTBEATS_S)
        await cluster.stop()

    run(main, max_virtual_s=100.0)


def test_a_gateway_that_was_away_for_long_knows_its_workers_as_soon() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"a": Role.BOTH, "b": Role.BOTH})
        await cluster.start()
        for away_s in (7.0, 7.3, 7.6, 7.9):  # wherever in its pauses a worker is when it comes back
            await cluster.gateways[GATEWAY].crash()
            await asyncio.sleep(away_s)
            await cluster.gateways[GATEWAY].restart()
            await cluster.complete(TWO_HEARTBEATS_S)
        await cluster.stop()

    run(main, max_virtual_s=100.0)
