"""A gateway that has just begun: those of its workers that it has not met yet are waited for."""

from __future__ import annotations

import asyncio

import pytest

from headrace.protocol.messages import Role
from headrace.protocol.requests import FinishReason, GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.sim.cluster import GATEWAY, SimCluster


@pytest.mark.parametrize("age", ["young", "old"])
def test_a_request_whose_worker_dies_waits_for_workers_that_a_young_gateway_has_not_met(age: str) -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, {"a": Role.BOTH, "b": Role.BOTH})
        await cluster.start()
        await cluster.gateways[GATEWAY].crash()
        simulation.network.partition(GATEWAY, "b")
        await cluster.gateways[GATEWAY].restart()
        await cluster.gateway.wait_ready(1)
        if age == "old":
            await asyncio.sleep(2 * cluster.options.heartbeat_s)
        request = GenerateRequest(
            request_id="r", prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=20, ignore_eos=True)
        )
        stream = cluster.gateway.submit(request)
        first = await anext(stream)
        await cluster.workers["a"].crash()
        await asyncio.sleep(0.5)
        simulation.network.heal(GATEWAY, "b")
        outputs = [*first, *[output async for outputs in stream for output in outputs]]
        finish = outputs[-1].finish
        assert finish is not None
        if age == "young":
            assert finish.reason is FinishReason.LENGTH
            tokens = [token for output in outputs for token in output.tokens]
            assert tokens == cluster.expected(request).tokens
        else:
            assert finish.error is not None
            assert "the engine was lost under the request" in finish.error.message
        cluster.workers["a"].restart()
        await cluster.complete()
        await cluster.settle()
        await cluster.stop()

    run(main, max_virtual_s=100.0)
