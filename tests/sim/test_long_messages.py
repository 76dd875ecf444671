"""What fits no message: it is that request's affair, and no fault of the worker that is being heard."""

from __future__ import annotations

import asyncio

import pytest

from headrace.cluster import Gateway
from headrace.engine.limits import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import ErrorCode, GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.sim.cluster import SimCluster

PROMPT = [n % 900 + 10 for n in range(120)]


def takes_at_most(gateway: Gateway, worker: str, size: int) -> None:
    member = gateway.registry.get(worker)
    assert member is not None
    member.channel._max_frame_bytes = size


async def in_cluster(simulation: Simulation, worker: str, size: int) -> SimCluster:
    cluster = SimCluster(simulation, {"p": Role.PREFILL, "d": Role.DECODE})
    await cluster.start()
    takes_at_most(cluster.gateway, worker, size)
    return cluster


def request() -> GenerateRequest:
    return GenerateRequest(
        request_id="r", prompt=PROMPT, sampling=SamplingParams(max_tokens=5, ignore_eos=True)
    )


@pytest.mark.parametrize(("worker", "size"), [("p", 150), ("d", 400)], ids=["prefill order", "ticket"])
def test_a_handoff_that_cannot_be_told_of_is_a_prefill_at_home(worker: str, size: int) -> None:
    async def main(simulation: Simulation) -> None:
        cluster = await in_cluster(simulation, worker, size)
        gateway = cluster.gateway
        tokens: list[int] = []
        async for outputs in gateway.submit(request()):
            for output in outputs:
                tokens += output.tokens
                assert output.finish is None or output.finish.error is None, output.finish
        assert tokens == cluster.shape.expected(request(), 0).tokens
        (journey,) = gateway.journeys.of("r")
        said = [(entry.what, str(entry.detail)) for entry in journey.entries]
        assert any("is not sent, the limit is" in what + detail for what, detail in said), said
        assert all("lost" not in what and what != "replayed" for what, _ in said), said
        await asyncio.sleep(5.0)
        for member in gateway.registry:
            assert (member.state, member.legs, member.exports) == ("up", set(), 0)
        await cluster.stop()

    run(main, max_virtual_s=100.0)


def test_a_request_that_fits_no_message_is_refused_with_the_limit() -> None:
    async def main(simulation: Simulation) -> None:
        cluster = await in_cluster(simulation, "d", 150)
        with pytest.raises(RequestRefused, match=r"bytes is not sent, the limit is 150") as refused:
            cluster.gateway.submit(request())
        assert refused.value.error.code is ErrorCode.INVALID
        assert cluster.gateway.open_samples == 0
        await cluster.stop()

    run(main, max_virtual_s=100.0)
