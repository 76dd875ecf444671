"""The gateway's queue in a whole cluster: who goes first when workers have enough to do."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import msgspec
import pytest
from test_replays import endings, in_cluster, request

from headrace.cluster.classes import Refusal
from headrace.engine.limits import RequestRefused
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
        assert not any(member.outstanding for member in gateway.registry.live())
        assert journey.entries[0].detail["why"] == "others wait before it"
        assert not gateway.backlog

    in_cluster(body, ONE, shape=SHAPE)


def test_when_all_places_are_taken_the_more_urgent_and_other_tenants_get_some() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway, refused = cluster.gateway, Counter[tuple[str, Refusal]]()
        observer = gateway._observer
        observer.refused = lambda request, why: refused.update([(request.tenant, why)])  # type: ignore[method-assign]

        def ask(name: str, tenant: str, priority: int = 0) -> asyncio.Task[list[FinishReason]]:
            asked = msgspec.structs.replace(request(name, 40), tenant=tenant, priority=priority)
            return asyncio.create_task(endings(gateway, asked))

        tasks = {f"a{i:02}": ask(f"a{i:02}", "alice") for i in range(32)}
        await asyncio.sleep(0.001)
        with pytest.raises(RequestRefused, match=r"room in about .* try again in \d+ s") as full:
            gateway.submit(msgspec.structs.replace(request("more", 40), tenant="alice"))
        assert full.value.error.retry_after_s == math.ceil(1 / 2 * 5)  # one ends, of 2 rows, which last 5 s
        tasks |= {"urgent": ask("urgent", "bob", -1), "b": ask("b", "bob")}
        await asyncio.gather(*tasks.values())
        lost = [name for name, task in tasks.items() if task.result() == [FinishReason.ERROR]]
        assert lost == ["a30", "a31"]  # the last come of who had most
        assert refused == {("alice", Refusal.QUEUE_FULL): 1, ("alice", Refusal.DISPLACED): 2}
        (journey,) = gateway.journeys.of("a31")
        assert [entry.what for entry in journey.entries][:2] == ["queued", "displaced"]
        assert "high priority came" in str(journey.entries[1].detail["why"])

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
        (journey,) = gateway.journeys.of("r7")
        assert journey.entries[-1].what == "ended: error"
        assert "send it again" in str(journey.entries[-1].detail["why"])
        assert journey.entries[-1].detail["code"] == "unavailable"
        assert cluster.simulation.loop.now - began_s < 5.0  # and not after the patience of a queue
        for worker in cluster.workers.values():
            cluster.simulation.network.heal(worker.name, "gateway")

    in_cluster(body, ONE, shape=SHAPE)
