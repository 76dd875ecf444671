"""Clocks of hosts: each its own, never back, and leases, heartbeats and time-outs go by them."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from headrace.protocol.handoff import BlockSpan, Computed, Exporting
from headrace.protocol.messages import Role
from headrace.sim import Simulation, run
from headrace.sim.clock import HostClock
from headrace.sim.cluster import SimCluster
from headrace.sim.load import Load, draw_request
from headrace.transfer import Exports, Pool

WORKERS = {"p": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE}


def test_a_clock_says_what_it_was_set_to_and_never_goes_back() -> None:
    clock = HostClock()
    clock.set(0.0, ahead_s=100.0, rate=2.0)
    assert clock.read(3.0) == 106.0
    clock.set(3.0, ahead_s=1.0, rate=0.5)
    assert clock.read(5.0) == 108.0
    for local_s in (random.Random(0).uniform(108, 1e5) for _ in range(1000)):
        assert clock.read(clock.due(local_s)) >= local_s
        assert clock.due(local_s) == pytest.approx(5 + (local_s - 108) * 2)
    for wrong in ({"ahead_s": -1.0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="both go forward"):
            clock.set(6.0, **wrong)


def test_programs_wait_by_the_clock_of_their_host() -> None:
    async def main(simulation: Simulation) -> list[tuple[str, float]]:
        loop, done = simulation.loop, []
        for host, rate in (("fast", 2.0), ("slow", 0.5)):
            loop.set_clock(simulation.network.clock(host), ahead_s=50.0, rate=rate)

        async def program(host: str) -> None:
            world = simulation.world(host)
            assert world.now() == 50.0
            try:
                async with asyncio.timeout(1.0):
                    await asyncio.create_task(asyncio.sleep(10))
            except TimeoutError:
                assert world.now() == 51.0
                done.append((host, loop.now))

        async with asyncio.TaskGroup() as group:
            for host in ("slow", "fast"):
                with simulation.on(host):
                    group.create_task(program(host))
        assert loop.time() == loop.now
        return done

    assert run(main).result == [("fast", 0.5), ("slow", 2.0)]


def test_a_jump_ends_the_waits_that_it_passes() -> None:
    async def main(simulation: Simulation) -> list[float]:
        clock = simulation.network.clock("a")
        with simulation.on("a"):
            waits = [asyncio.create_task(asyncio.sleep(s)) for s in (1.0, 3.0)]
        beside = asyncio.create_task(asyncio.sleep(1.0))
        await asyncio.sleep(0.5)
        simulation.loop.set_clock(clock, ahead_s=1.5)
        found = []
        for task in (*waits, beside):
            await task
            found.append(simulation.loop.now)
        return found

    assert run(main).result == [0.5, 1.5, 1.5]


def test_what_arrives_is_heard_by_the_receivers_clock() -> None:
    async def main(simulation: Simulation) -> dict[str, float]:
        network, heard = simulation.network, {}
        simulation.loop.set_clock(network.clock("a"), ahead_s=1000.0)
        a, b = simulation.world("a"), simulation.world("b")

        async def serve(connection: Any) -> None:
            await connection.read(1)
            heard["b"] = b.now()
            connection.write(b"y")
            await connection.drain()

        with simulation.on("b"):
            await b.network.listen("b:1", serve)
        with simulation.on("a"):
            connection = await a.network.connect("b:1", timeout_s=1)
            connection.write(b"x")
            await connection.read(1)
            heard["a"] = a.now()
            connection.abort()
        return heard

    heard = run(main).result
    assert heard["b"] < 1 < 1000 < heard["a"] < 1001


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_a_lease_lasts_as_long_as_it_says_by_the_clock_of_its_source(rate: float) -> None:
    async def main(simulation: Simulation) -> float:
        clock, loop = simulation.network.clock("p"), simulation.loop
        loop.set_clock(clock, ahead_s=1e4, rate=rate)
        ended: asyncio.Future[float] = loop.create_future()
        with simulation.on("p"):
            exports = Exports(
                simulation.world("p"),
                Pool(memoryview(bytearray(64)), 32, 4, "layout"),
                worker_id="p",
                generation=1,
                address="p:1",
                released=lambda name, how: ended.set_result(loop.now),
                lease_s=3.0,
            )
            exports.offer(Exporting("r", 8, []))
            exports.computed(Computed("r", 8, [BlockSpan(0, 0, [0, 1])]))
            exports.held("r")
            lasted_s = await ended
            await exports.close()
        return lasted_s

    assert run(main).result == pytest.approx(3.0 / rate)


@pytest.mark.parametrize("rates", [(0.5, 2.0, 1.0, 1.0), (2.0, 0.5, 1.3, 0.8)])
def test_a_cluster_serves_whatever_its_clocks_say(rates: tuple[float, ...]) -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, WORKERS)
        chance = random.Random(0)
        hosts = ("gateway", *WORKERS)
        cluster.set_clocks(
            {host: (chance.uniform(0, 1e5), rate) for host, rate in zip(hosts, rates, strict=True)}
        )
        await cluster.start()
        load = Load(cluster, 1)
        for number in range(10):
            await load.ask(cluster.gateway, draw_request(random.Random(number), number))
        assert set(load.endings) <= {"length", "stop"}
        await cluster.settle()
        await cluster.stop()

    run(main, max_virtual_s=100.0)
