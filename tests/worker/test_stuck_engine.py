"""An engine whose step does not end: when it is given up, and how soon there is another."""

from __future__ import annotations

import asyncio

from headrace.protocol.messages import Role
from headrace.protocol.requests import GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.sim.cluster import SimCluster
from headrace.worker.life import PING_S

STEP_TIMEOUT_S = 5.0
"""Of a simulated worker."""
REPLACED_WITHIN_S = 0.5
"""The pause before an engine is started again, and what a start takes in the simulation."""


def test_a_stuck_engine_is_replaced_as_soon_as_it_is_known_to_be_stuck() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"a": Role.BOTH, "b": Role.BOTH})
        await cluster.start()
        member = cluster.gateway.registry.get("a")
        assert member is not None
        freezing = asyncio.create_task(cluster.workers["a"].slow_down(None, 1000.0))
        streams = [
            cluster.gateway.submit(
                GenerateRequest(
                    request_id=f"r{number}",
                    prompt=[1, 2, 3],
                    sampling=SamplingParams(max_tokens=50, ignore_eos=True),
                )
            )
            for number in range(2)  # one for each worker
        ]
        began_s = simulation.loop.time()
        while cluster.gateway.registry.get("a") in (member, None):
            await cluster.gateway.wait_changed()
        assert member.why_down.startswith("its engine was lost with a step that did not end within 5 s")
        took_s = simulation.loop.time() - began_s
        assert STEP_TIMEOUT_S < took_s < STEP_TIMEOUT_S + PING_S + REPLACED_WITHIN_S
        for stream in streams:
            endings = [o.finish async for outputs in stream for o in outputs if o.finish is not None]
            assert [finish.error for finish in endings] == [None]
        freezing.cancel()
        await cluster.settle()
        await cluster.stop()

    run(main, max_virtual_s=100.0)
