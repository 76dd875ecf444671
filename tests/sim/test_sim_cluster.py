"""Prefill and decode apart, undisturbed: real gateway, supervisors, engines, transfers in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from headrace.cluster.facts import Fact
from headrace.cluster.holdings import Prompt
from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.cluster.placement import every
from headrace.cluster.registry import Member
from headrace.cluster.stream import OutputStream
from headrace.protocol.messages import FromGateway, KVWanted, Role
from headrace.protocol.requests import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SequenceOutput,
)
from headrace.sim import Simulation, run
from headrace.sim.cluster import SimCluster

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
CLUSTERS = {
    "1P1D": {"p": P, "d": D},
    "1P2D": {"p": P, "d1": D, "d2": D},
    "2P2D": {"p1": P, "p2": P, "d1": D, "d2": D},
    "both": {"b1": B, "b2": B},
    "mixed": {"p": P, "b": B, "d": D},
    "1B1D": {"b": B, "d": D},
}


def in_cluster(
    roles: dict[str, Role], body: Callable[[SimCluster], Awaitable[None]], *, seed: int = 0, **options: Any
) -> str:
    async def main(simulation: Simulation) -> None:
        cluster = SimCluster(simulation, roles, **options)
        await cluster.start()
        try:
            await body(cluster)
            await cluster.settle()
        finally:
            await cluster.stop()

    return run(main, seed=seed, max_virtual_s=1000.0).trace_hash


def request(name: str, length: int = 40, **sampling: Any) -> GenerateRequest:
    generator = random.Random(name)
    prompt = [generator.randrange(8, 1000) for _ in range(length)]
    params = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(request_id=name, prompt=prompt, sampling=SamplingParams(**params))


async def collect(stream: OutputStream) -> dict[int, list[SequenceOutput]]:
    found: dict[int, list[SequenceOutput]] = {}
    async for outputs in stream:
        for output in outputs:
            found.setdefault(output.index, []).append(output)
    return found


def check(cluster: SimCluster, r: GenerateRequest, found: dict[int, list[SequenceOutput]]) -> None:
    """Every sample is what it is alone, and ends once."""
    assert sorted(found) == list(range(r.sampling.n))
    for index, outputs in found.items():
        alone = cluster.expected(r, index)
        assert [token for output in outputs for token in output.tokens] == alone.tokens
        assert [output.finish is not None for output in outputs].count(True) == 1
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
        if r.sampling.logprobs is not None:
            assert [entry for output in outputs for entry in output.logprobs or ()] == alone.logprobs
        told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        if r.sampling.prompt_logprobs is not None and index == 0:
            assert told == [alone.prompt_logprobs]
        assert [output.cached_tokens for output in outputs if output.cached_tokens is not None][1:] == []


def whats(cluster: SimCluster, name: str) -> list[str]:
    (journey,) = cluster.gateway.journeys.of(name)
    return [entry.what for entry in journey.entries]


def test_a_long_prompt_is_prefilled_there_and_decoded_here() -> None:
    async def body(cluster: SimCluster) -> None:
        r = request("long")
        check(cluster, r, await collect(cluster.gateway.submit(r)))
        assert whats(cluster, "long") == [
            "placed",
            "offloaded",
            "reserved",
            "prefill placed",
            "first token",
            "blocks transferred",
            "ended: length",
        ]
        one_chunk = request("one chunk", length=20)
        check(cluster, one_chunk, await collect(cluster.gateway.submit(one_chunk)))
        assert "blocks transferred" in whats(cluster, "one chunk")
        short = request("short", length=12)
        check(cluster, short, await collect(cluster.gateway.submit(short)))
        assert "prefill placed" not in whats(cluster, "short")

    in_cluster(CLUSTERS["1P1D"], body)


@pytest.mark.parametrize("roles", CLUSTERS)
@pytest.mark.parametrize("seed", range(3))
def test_many_requests_in_every_kind_of_cluster(roles: str, seed: int) -> None:
    async def body(cluster: SimCluster) -> None:
        generator = random.Random(seed)

        async def one(number: int) -> None:
            await asyncio.sleep(generator.uniform(0, 0.5))
            r = request(
                f"r{generator.randrange(20)}" if number < 0 else f"r{number}",
                length=generator.choice([1, 5, 12, 13, 16, 40, 41, 63, 64, 100]),
                max_tokens=generator.choice([1, 2, 5, 30]),
                temperature=generator.choice([0.0, 1.0]),
                n=generator.choice([1, 1, 1, 2, 3]),
                seed=generator.randrange(1 << 32),
                logprobs=generator.choice([None, 2]),
                prompt_logprobs=generator.choice([None, None, None, 1]),
                ignore_eos=generator.random() < 0.5,
            )
            check(cluster, r, await collect(cluster.gateway.submit(r)))

        await asyncio.gather(*(one(number) for number in range(40)))

    in_cluster(CLUSTERS[roles], body, seed=seed)


def test_a_prompt_that_is_cached_at_home_is_not_offloaded_again() -> None:
    async def body(cluster: SimCluster) -> None:
        first = request("a", length=60)
        check(cluster, first, await collect(cluster.gateway.submit(first)))
        again = GenerateRequest(request_id="b", prompt=[*first.prompt, 9], sampling=first.sampling)
        check(cluster, again, await collect(cluster.gateway.submit(again)))
        assert "prefill placed" in whats(cluster, "a")
        assert "prefill placed" not in whats(cluster, "b")

    in_cluster(CLUSTERS["1P1D"], body)


def test_a_home_that_has_what_a_gateway_does_not_know_of_declines_to_have_it_prefilled() -> None:
    """Without the cluster's key a gateway guesses by what it sent, and another one sent this."""

    async def body(cluster: SimCluster) -> None:
        first = request("a", length=60)
        check(cluster, first, await collect(cluster.gateway.submit(first)))
        other = cluster.live_gateways()["gateway2"]
        again = GenerateRequest(request_id="b", prompt=[*first.prompt, 9], sampling=first.sampling)
        with cluster.on(other):
            check(cluster, again, await collect(other.submit(again)))
        (journey,) = other.journeys.of("b")
        assert "prefilled at home, which has most of it" in [entry.what for entry in journey.entries]

    options = GatewayOptions(split=SplitPolicy(prompt_length_threshold=12))
    in_cluster(CLUSTERS["1P1D"], body, gateways=2, options=options)


@pytest.mark.parametrize("roles", ["1P1D", "2P2D", "mixed"])
def test_a_gateway_knows_what_each_prefix_cache_holds(roles: str) -> None:
    """Whatever was computed, moved and evicted: the index has what the engines' pools have."""

    async def body(cluster: SimCluster) -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(number // 6 * 0.2)
            prompt = request(f"shared {number % 4}", length=40).prompt + request(f"own {number}").prompt
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            r = GenerateRequest(request_id=f"r{number}", prompt=prompt, sampling=params)
            check(cluster, r, await collect(cluster.gateway.submit(r)))

        await asyncio.gather(*(one(number) for number in range(30)))
        await asyncio.sleep(1.0)
        holdings = cluster.gateway._dispatch._holdings
        evicted = 0
        for name, worker in cluster.workers.items():
            assert worker.engine is not None
            cache = worker.engine.scheduler.cache
            member = cluster.gateway.registry.get(name)
            assert member is not None
            assert member.stats is not None
            assert holdings.is_exact(member)
            assert member.facts[Fact.QUEUED] == member.facts[Fact.UNSEEN] == 0
            evicted += member.stats.evictions
            for number in range(30):
                prompt = request(f"shared {number % 4}", length=40).prompt + request(f"own {number}").prompt
                chain = cache.hasher.chain(cache.root("shared:"), prompt[:-1])
                there = [cache.pool.find(identity + b"\0\0") is not None for identity in chain]
                leading = there.index(False) if False in there else len(there)
                known = holdings.cached_tokens(Prompt(prompt, "shared:"), every([member]).facts, 0.0)
                assert known[0] == leading * cache.block_size
        assert evicted > 0

    in_cluster(CLUSTERS[roles], body)


def test_a_gateway_that_reads_too_slowly_misses_events_and_asks_for_all_of_it() -> None:
    async def body(cluster: SimCluster) -> None:
        asked = []
        dispatch = cluster.gateway._dispatch
        post = cluster.gateway.post

        def counted(member: Member, message: FromGateway) -> None:
            if isinstance(message, KVWanted):
                asked.append(member.worker_id)
            post(member, message)

        dispatch._desk.post = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.1)  # until it has been welcomed
        asked.clear()
        worker = cluster.workers["b"]
        assert worker.supervisor is not None
        assert worker.supervisor.life is not None
        (session,) = worker.supervisor.life._relay.sessions
        assert session._channel is not None
        behind = property(lambda channel: channel is session._channel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(session._channel), "is_behind", behind)
            r = request("a", length=60)
            check(cluster, r, await collect(cluster.gateway.submit(r)))
        await asyncio.sleep(1.0)  # a heartbeat tells of what was missed
        member = cluster.gateway.registry.get("b")
        assert member is not None
        assert dispatch._holdings.is_exact(member)
        known = dispatch._holdings.cached_tokens(Prompt(r.prompt, "shared:"), every([member]).facts, 0.0)
        assert known[0] == 56
        assert asked == ["b"]

    in_cluster({"b": B}, body)


def test_a_source_that_falls_silent_after_the_first_token_is_waited_for_within_a_bound() -> None:
    async def body(cluster: SimCluster) -> None:
        loop, r = cluster.simulation.loop, request("long", length=100)
        began_s = loop.time()
        stream = cluster.gateway.submit(r)
        await asyncio.sleep(0.03)  # the pull is connected, and nothing is computed to its end
        cluster.simulation.network.partition("p", "d", one_way=True)
        check(cluster, r, await collect(stream))
        assert "transfer failed" in whats(cluster, "long")
        assert loop.time() - began_s < 20
        cluster.simulation.network.heal("p", "d")

    in_cluster(CLUSTERS["1P1D"], body)


def test_a_drained_worker_says_why_it_left() -> None:
    async def body(cluster: SimCluster) -> None:
        member = cluster.gateway.registry.get("d2")
        assert member is not None
        cluster.gateway.drain_worker(member)
        async with asyncio.timeout(10):
            while member.is_live:
                await cluster.gateway.wait_changed()
        assert member.why_down == "it was drained"

    in_cluster(CLUSTERS["1P2D"], body)


def test_a_request_that_two_workers_died_under_is_not_carried_to_a_third() -> None:
    async def body(cluster: SimCluster) -> None:
        r = request("poison", length=200)
        reading = asyncio.create_task(collect(cluster.gateway.submit(r)))
        while "prefill placed" not in whats(cluster, "poison"):
            await asyncio.sleep(0.001)
        await cluster.workers["p"].crash()
        while "prefill worker lost" not in whats(cluster, "poison"):
            await asyncio.sleep(0.001)
        home = next(w for n in ("d1", "d2") if (w := cluster.workers[n]).engine and w.engine.has_work)
        await home.crash()
        ((output,),) = (await reading).values()
        assert output.finish is not None
        assert output.finish.error is not None
        assert output.finish.error.code is ErrorCode.UNAVAILABLE
        assert "2 workers were lost under the request" in output.finish.error.message
        cluster.workers["p"].restart()
        home.restart()
        await cluster.gateway.wait_ready(3)

    in_cluster(CLUSTERS["1P2D"], body)
