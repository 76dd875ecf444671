"""The gateway's queue in a whole cluster: who goes first when workers have enough to do."""

from __future__ import annotations

import asyncio

import msgspec
from test_replays import endings, in_cluster, request

from headrace.protocol.messages import Role
from headrace.protocol.requests import FinishReason
from headrace.sim.cluster import SimCluster
from headrace.sim.shape import EngineShape

ONE = {"d": Role.DECODE}
SHAPE = EngineShape(max_num_seqs=2, max_waiting=30)


def test_classes_and_tenants_take_their_turns_and_it_is_told() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway, ended = cluster.gateway, []

        async def ask(name: str, tenant: str = "", priority: int = 0) -> None:
            asked = msgspec.structs.replace(request(name, 40), tenant=tenant, priority=priority)
            assert await endings(gateway, asked) == [FinishReason.LENGTH]
            ended.append(name)

        tasks = [asyncio.create_task(ask("first", "busy", priority=1))]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(ask(f"busy{i}", "busy", priority=1)) for i in range(10)]
        await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(ask("light", "light", priority=1)))
        tasks.append(asyncio.create_task(ask("normal")))
        await asyncio.sleep(0.001)
        waiting = {queue.band: queue.requests for queue in gateway.backlog.queues()}
        assert waiting["low"] >= 7
        await asyncio.gather(*tasks)
        assert ended.index("normal") <= 3  # it was the last that came
        assert ended.index("light") <= 6
        busy = [name for name in ended if name.startswith("busy")]
        assert busy == sorted(busy)  # inside a tenant the first come is the first served
        (journey,) = gateway.journeys.of("busy9")
        assert [entry.what for entry in journey.entries[:2]] == ["queued", "placed"]
        assert journey.entries[0].detail["band"] == "low"
        assert not gateway.backlog

    in_cluster(body, ONE, shape=SHAPE)


def test_what_finds_credit_never_waits() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        for i in range(3):
            await endings(gateway, request(f"r{i}", 5))
            (journey,) = gateway.journeys.of(f"r{i}")
            assert journey.entries[0].what == "placed"
            assert journey.entries[0].at_s == 0.0

    in_cluster(body, ONE, shape=SHAPE)


def test_without_a_worker_that_may_come_nobody_waits_on() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        await asyncio.sleep(5.0)  # a young gateway would expect others yet
        tasks = [asyncio.create_task(endings(gateway, request(f"r{i}", 400))) for i in range(8)]
        await asyncio.sleep(0.01)
        assert gateway.backlog
        for worker in cluster.workers.values():
            cluster.simulation.network.partition(worker.name, "gateway")
        began_s = cluster.simulation.loop.now
        found = await asyncio.gather(*tasks)
        assert found == [[FinishReason.ERROR]] * 8
        assert cluster.simulation.loop.now - began_s < 5.0  # and not after the patience of a queue
        for worker in cluster.workers.values():
            cluster.simulation.network.heal(worker.name, "gateway")

    in_cluster(body, ONE, shape=SHAPE)
