"""An engine that is killed while it starts, which is no fault of its own."""

from __future__ import annotations

import asyncio

from headrace.protocol.messages import Role
from headrace.sim import Simulation, run
from headrace.sim.cluster import SimCluster


def test_an_engine_that_is_killed_as_it_starts_is_started_again() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"w": Role.BOTH})
        starting = asyncio.create_task(cluster.start())
        for _ in range(3):
            while not cluster.workers["w"].kill_engine():
                await asyncio.sleep(1e-6)
            assert cluster.gateway.registry.get("w") is None, "it was up already"
        await starting
        await cluster.stop()

    run(main, max_virtual_s=100.0)
