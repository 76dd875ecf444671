"""Which workers a gateway takes in, and whose failures are its own."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest

from headrace.cluster import Gateway, GatewayState
from headrace.cluster.options import GatewayOptions, ModelOptions
from headrace.cluster.registry import Registry, Unfit, UnfitNow
from headrace.protocol.channel import Channel
from headrace.protocol.messages import (
    PROTOCOL_VERSION,
    Cancel,
    EngineInfo,
    FromGateway,
    Hello,
    Role,
    StartFailed,
    WorkerInfo,
)
from headrace.sim import Simulation, run

ENGINE = EngineInfo(
    model="m",
    revision="r1",
    numerics="n",
    dtype="bfloat16",
    batch_invariant=False,
    max_model_len=1000,
    vocab_size=100,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_waiting=4,
    block_size=16,
    num_blocks=100,
    block_bytes=1,
    weight_bytes=1,
    prefix_caching=True,
    kv_layout="l",
    threads=1,
    pid=1,
)
NO_CHANNEL = cast(Channel[Any], None)


def worker(name: str, **engine: Any) -> WorkerInfo:
    info = msgspec.structs.replace(ENGINE, **engine)
    return WorkerInfo(worker_id=name, generation=1, role=Role.BOTH, data_address="", engine=info)


def test_the_first_worker_must_have_the_gateways_model() -> None:
    registry = Registry(GatewayOptions(models=(ModelOptions(name="m", revision="r1"),)))
    with pytest.raises(Unfit, match="its model revision is r2, and that of the gateway is r1"):
        registry.register(worker("w", revision="r2"), NO_CHANNEL, 0.0)
    registry.register(worker("w"), NO_CHANNEL, 0.0)


@pytest.mark.parametrize("name", ["w", "other"])
def test_what_waits_for_a_lost_worker_is_not_gone_on_with_by_another_model(name: str) -> None:
    options = GatewayOptions()
    registry = Registry(options)
    registry.register(worker("w"), NO_CHANNEL, 0.0)
    lost = registry.get("w")
    assert lost is not None
    registry.down(lost, "lost", 1.0)
    another = worker(name, dtype="float32")
    with pytest.raises(UnfitNow, match="its dtype is float32, and that of w is bfloat16, whose requests"):
        registry.register(another, NO_CHANNEL, 2.0, owes=True)
    registry.forget(2.0 + options.replay_timeout_s)
    registry.register(another, NO_CHANNEL, 2.0 + options.replay_timeout_s, owes=True)


def test_where_nothing_waits_another_model_may_come_at_once() -> None:
    registry = Registry(GatewayOptions())
    registry.register(worker("w"), NO_CHANNEL, 0.0)
    lost = registry.get("w")
    assert lost is not None
    registry.down(lost, "lost", 1.0)
    registry.register(worker("w", dtype="float32"), NO_CHANNEL, 2.0)


def test_workers_that_have_gone_are_forgotten() -> None:
    options = GatewayOptions()
    registry = Registry(options)
    registry.register(worker("w"), NO_CHANNEL, 0.0)
    lost = registry.get("w")
    assert lost is not None
    registry.down(lost, "lost", 1.0)
    registry.forget(1.0 + options.replay_timeout_s)
    assert registry.get("w") is lost
    registry.forget(1.1 + options.replay_timeout_s)
    assert registry.get("w") is None


def test_a_strangers_failure_to_start_is_no_failure_of_the_gateway() -> None:
    async def main(simulation: Simulation) -> None:
        with simulation.on("gateway"):
            gateway = Gateway(simulation.world("gateway"))
            await gateway.listen("gateway:1", own=False)
            await gateway.listen("gateway:2", own=True)
        for port, state in ((1, GatewayState.STARTING), (2, GatewayState.DEAD)):
            connection = await simulation.world("w").network.connect(f"gateway:{port}", timeout_s=1.0)
            channel: Channel[FromGateway] = Channel(connection, receives=FromGateway)
            channel.post(StartFailed("no memory"))
            await channel.close()
            await asyncio.sleep(0.1)
            assert gateway.state is state
        await gateway.drain(0.0)

    run(main, max_virtual_s=10.0)


def test_a_worker_that_does_not_read_does_not_hold_up_the_end() -> None:
    async def main(simulation: Simulation) -> None:
        with simulation.on("gateway"):
            gateway = Gateway(simulation.world("gateway"))
            await gateway.listen("gateway:1")
        connection = await simulation.world("w").network.connect("gateway:1", timeout_s=1.0)
        channel: Channel[FromGateway] = Channel(connection, receives=FromGateway)
        channel.post(Hello(PROTOCOL_VERSION, worker("w")))
        await gateway.wait_ready()
        simulation.network.partition("gateway", "w")
        member = gateway.registry.get("w")
        assert member is not None
        for _ in range(100):
            gateway.post(member, Cancel("x" * 10_000))
        began_s = simulation.loop.now
        await gateway.drain(0.0)
        assert 1.0 < simulation.loop.now - began_s < 3.0, "it did not wait, or for too long"
        connection.abort()

    run(main, max_virtual_s=100.0)
