"""A cluster under faults: whatever breaks, every sample ends once, says nothing wrong, and nothing is left.

Replay a seed: PYTHONPATH=tests/sim python -c "import test_cluster_faults as t; print(t.life(7))".
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from headrace.engine import RequestRefused
from headrace.protocol.messages import Role
from headrace.protocol.requests import ErrorCode, FinishReason, GenerateRequest, SamplingParams
from headrace.sim import Simulation, run
from headrace.sim.cluster import EngineShape, SimCluster
from headrace.sim.faults import Fault, draw, play

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
CLUSTERS = [
    {"p": P, "d": D},
    {"p": P, "d1": D, "d2": D},
    {"p1": P, "p2": P, "d1": D, "d2": D},
    {"b1": B, "b2": B, "b3": B},
    {"p": P, "b": B, "d": D},
    {"p1": P, "p2": P, "d1": D, "d2": D, "d3": D, "b": B},
]
REQUESTS = 40
FAULTS = 6
LOAD_S = 4.0
SHAPE = EngineShape()


def draw_request(generator: random.Random, number: int) -> GenerateRequest:
    shared = [8 + generator.randrange(3)] * 16
    prompt = shared[: generator.choice([0, 8, 16])]
    prompt += [generator.randrange(8, 1000) for _ in range(generator.choice([1, 6, 20, 50, 90]))]
    sampling = SamplingParams(
        max_tokens=generator.choice([1, 3, 10, 40, 100]),
        temperature=generator.choice([0.0, 1.0]),
        n=generator.choice([1, 1, 1, 2, 3]),
        seed=generator.randrange(1 << 32),
        logprobs=generator.choice([None, None, 1]),
        prompt_logprobs=generator.choice([None, None, None, None, 1]),
        min_tokens=generator.choice([0, 0, 1]),
        ignore_eos=generator.random() < 0.5,
    )
    return GenerateRequest(request_id=f"r{number}", prompt=prompt, sampling=sampling)


async def client(cluster: SimCluster, generator: random.Random, number: int) -> FinishReason | None:
    """Ask, perhaps lose patience, and see that all that came is right. Returns how sample 0 ended."""
    await asyncio.sleep(generator.uniform(0, LOAD_S))
    r = draw_request(generator, number)
    patience = generator.choice([None, None, None, 0, generator.randrange(1, 60)])
    try:
        stream = cluster.gateway.submit(r)
    except RequestRefused as refused:
        assert refused.error.code in (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED)
        return None
    indices = range(r.sampling.n)
    tokens: dict[int, list[int]] = {index: [] for index in indices}
    logprobs: dict[int, list[Any]] = {index: [] for index in indices}
    told: list[Any] = []
    endings: dict[int, FinishReason] = {}
    if patience == 0:
        await asyncio.sleep(generator.choice([0, 0.001, 0.01, 0.05]))
        stream.cancel(r.request_id)
        patience = None
    async for outputs in stream:
        for output in outputs:
            assert output.index not in endings, "it goes on after its ending"
            tokens[output.index] += output.tokens
            logprobs[output.index] += output.logprobs or []
            if output.prompt_logprobs is not None:
                told.append(output.prompt_logprobs)
            if output.finish:
                endings[output.index] = output.finish.reason
                if output.finish.error is not None:
                    assert output.finish.error.code is ErrorCode.UNAVAILABLE, output.finish.error
        if patience is not None and sum(map(len, tokens.values())) >= patience:
            patience = None
            if generator.random() < 0.5:
                stream.close()
            else:
                stream.cancel(r.request_id)
    assert len(endings) == r.sampling.n or stream.closed
    assert len(told) <= 1
    for index, got in tokens.items():
        alone = cluster.expected(r, index)
        whole = endings.get(index) in (FinishReason.STOP, FinishReason.LENGTH)
        assert got == (alone.tokens if whole else alone.tokens[: len(got)]), f"{r.request_id} sample {index}"
        if alone.logprobs is not None:
            assert logprobs[index] == alone.logprobs[: len(got)]
    if told:
        assert told[0] == cluster.expected(r, 0).prompt_logprobs
    elif r.sampling.prompt_logprobs is not None and 0 in endings and not stream.closed:
        assert endings[0] in (FinishReason.CANCELLED, FinishReason.ERROR)
    return endings.get(0)


def life(seed: int, faults: list[Fault] | None = None) -> tuple[str, list[FinishReason | None]]:
    """One standard life: 40 requests, 6 faults. Returns the trace hash and how the requests ended."""

    async def main(simulation: Simulation) -> list[FinishReason | None]:
        chance = random.Random(seed)
        roles = chance.choice(CLUSTERS)
        cluster = SimCluster(simulation, roles, shape=SHAPE)
        await cluster.start()
        try:
            planned = faults if faults is not None else draw(chance, list(roles), FAULTS, LOAD_S)
            playing = asyncio.create_task(play(cluster, planned))
            clients = [
                asyncio.create_task(client(cluster, random.Random(f"{seed} {number}"), number))
                for number in range(REQUESTS)
            ]
            endings = await asyncio.gather(*clients)
            await playing
            await cluster.settle()
            await cluster.gateway.wait_ready(len(roles))  # everybody is back
            r = draw_request(chance, REQUESTS)
            stream = cluster.gateway.submit(r)
            got = [token async for outputs in stream for o in outputs for token in o.tokens if o.index == 0]
            assert got == cluster.expected(r).tokens
            await cluster.settle()
            return endings
        finally:
            await cluster.stop()

    outcome = run(main, seed=seed, max_virtual_s=600.0, max_callbacks=3_000_000)
    return outcome.trace_hash, outcome.result


@pytest.mark.parametrize("seed", range(100 * int(os.environ.get("HEADRACE_EXAMPLES", "1"))))
def test_whatever_breaks_nothing_is_wrong_lost_or_left(seed: int) -> None:
    life(seed)
