"""Requests whose worker is lost: who goes on, in which order, and what nobody wants any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from headrace.cluster import Gateway, GatewayState
from headrace.engine.limits import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import ErrorCode, FinishReason, GenerateRequest, SamplingParams
from headrace.sim import Crash, Simulation, run
from headrace.sim.cluster import SimCluster
from headrace.sim.shape import EngineShape

TWO = {"d1": Role.DECODE, "d2": Role.DECODE}
NARROW = EngineShape(max_num_seqs=2, max_waiting=2)


def in_cluster(
    body: Callable[[SimCluster], Awaitable[None]], roles: dict[str, Role] | None = None, **options: Any
) -> None:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, roles or TWO, **options)
        await cluster.start()
        try:
            await body(cluster)
        finally:
            await cluster.stop()

    run(main, max_virtual_s=400.0, max_callbacks=20_000_000)


def request(name: str, max_tokens: int = 100, n: int = 1) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True, temperature=0.0)
    return GenerateRequest(request_id=name, prompt=[9] * 8, sampling=sampling)


async def endings(gateway: Gateway, asked: GenerateRequest) -> list[FinishReason]:
    return [
        output.finish.reason
        async for outputs in gateway.submit(asked)
        for output in outputs
        if output.finish is not None
    ]


def home_of(gateway: Gateway, name: str) -> str:
    (journey,) = gateway.journeys.of(name)
    return next(entry.worker for entry in reversed(journey.entries) if entry.what == "placed")


def check_books(gateway: Gateway) -> None:
    for member in gateway.registry:
        assert (member.open_samples, member.exports, member.legs) == (0, 0, set()), member.worker_id


def test_what_a_client_left_is_not_computed_again_elsewhere() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        stream = gateway.submit(request("left"))
        await anext(stream)
        cluster.simulation.network.partition(home_of(gateway, "left"), "gateway")
        stream.close()
        while gateway.open_samples:
            await gateway.wait_changed()
        (journey,) = gateway.journeys.of("left")
        assert [entry.what for entry in journey.entries if entry.what.startswith(("placed", "ended"))] == [
            "placed",
            "ended: cancelled",
        ]
        check_books(gateway)

    in_cluster(body)


def test_queues_that_two_gateways_fill_are_waited_for() -> None:
    async def body(cluster: SimCluster) -> None:
        gateways = [one.gateway for one in cluster.gateways.values() if one.gateway is not None]
        asked = [(gateway, f"r{i}") for gateway in gateways for i in range(8)]
        found = await asyncio.gather(*(endings(gateway, request(name)) for gateway, name in asked))
        assert found == [[FinishReason.LENGTH]] * 16
        ways = [[entry.what for entry in gateway.journeys.of(name)[0].entries] for gateway, name in asked]
        replays = [way.count("replayed") for way in ways]
        assert 0 < max(replays) < 200, "no queue was full, or one was asked again and again"
        for gateway in gateways:
            check_books(gateway)

    in_cluster(body, gateways=2, shape=NARROW)


def test_who_lost_a_worker_comes_before_who_asks_anew() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        done = asyncio.Event()
        accepted_s: list[float] = []

        async def newcomers(name: str) -> None:
            i = 0
            while not done.is_set():
                try:
                    asked, i = request(f"{name}-{i}", max_tokens=60), i + 1
                    await endings(gateway, asked)
                    accepted_s.append(gateway.journeys.of(asked.request_id)[0].began_s)
                except RequestRefused as refused:
                    assert refused.error.code is ErrorCode.OVERLOADED
                    await asyncio.sleep(0.003)

        old = [asyncio.create_task(endings(gateway, request(f"old{i}"))) for i in range(8)]
        await asyncio.sleep(0.05)
        new = [asyncio.create_task(newcomers(f"new{k}")) for k in range(12)]
        await cluster.workers["d1"].crash(Crash.RESET)
        assert await asyncio.gather(*old) == [[FinishReason.LENGTH]] * 8
        done.set()
        await asyncio.gather(*new)
        replaced_s = [
            journey.began_s + entry.at_s
            for i in range(8)
            for journey in gateway.journeys.of(f"old{i}")
            for entry in journey.entries
            if entry.what == "placed"
        ]
        assert len(replaced_s) > 8 and accepted_s, "nobody was replayed, or nobody came anew"
        assert max(replaced_s) <= min(accepted_s)
        check_books(gateway)

    in_cluster(body, shape=NARROW)


def test_one_that_fits_nowhere_does_not_hold_back_those_that_do() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway, finished = cluster.gateway, []

        async def one(asked: GenerateRequest) -> None:
            await endings(gateway, asked)
            finished.append(asked.request_id)

        tasks = []
        for asked in (request("large", n=4), request("small", n=2), request("stays", max_tokens=1500)):
            tasks.append(asyncio.create_task(one(asked)))
            await asyncio.sleep(0.001)
        homes = [home_of(gateway, name) for name in ("large", "small", "stays")]
        assert len(set(homes)) == 3
        for home in homes[:2]:
            await cluster.workers[home].crash(Crash.RESET)
        await asyncio.gather(*tasks)
        assert finished == ["small", "stays", "large"]

    in_cluster(body, {**TWO, "d3": Role.DECODE}, shape=NARROW)


def test_workers_on_their_way_out_are_named_as_the_reason() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        streams = [asyncio.create_task(endings(gateway, request(f"r{i}", 400))) for i in range(2)]
        await asyncio.sleep(0.01)
        for member in list(gateway.registry):
            gateway.drain_worker(member)
        await asyncio.sleep(0.01)
        with pytest.raises(RequestRefused) as refused:
            gateway.submit(request("late"))
        assert refused.value.error.code is ErrorCode.UNAVAILABLE
        assert "shutting down" in refused.value.error.message
        assert gateway.state is GatewayState.READY and not gateway.takes_requests
        await asyncio.gather(*streams)

    in_cluster(body)


def test_a_broken_connection_is_no_death_once_the_engine_is_back() -> None:
    async def body(cluster: SimCluster) -> None:
        gateway = cluster.gateway
        asked = asyncio.create_task(endings(gateway, request("r", max_tokens=3000)))
        for _ in range(4):  # twice as many as may die under one request
            await asyncio.sleep(0.5)
            home = home_of(gateway, "r")
            cluster.simulation.network.break_connections(home, "gateway")
        assert await asked == [FinishReason.LENGTH]
        assert home_of(gateway, "r")
        check_books(gateway)

    in_cluster(body)
