"""What a journey tells of a request: why its prompt was offloaded or not, and how old what was known is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_sim_cluster import CLUSTERS, collect, in_cluster, request

from headrace.cluster.options import GatewayOptions, SplitPolicy
from headrace.protocol.messages import Role
from headrace.protocol.requests import GenerateRequest
from headrace.sim.cluster import SimCluster


def told(cluster: SimCluster, name: str) -> tuple[str, dict[str, Any]]:
    (journey,) = cluster.gateway.journeys.of(name)
    (entry,) = [one for one in journey.entries if one.what in ("offloaded", "not offloaded")]
    assert entry.worker == next(one.worker for one in journey.entries if one.what == "placed")
    return entry.what, entry.detail


def asked(cluster: SimCluster, *requests: GenerateRequest) -> Any:
    async def all_of_them() -> None:
        for one in requests:
            await collect(cluster.gateway.submit(one))

    return all_of_them()


def test_a_long_prompt_that_nobody_knows_is_offloaded() -> None:
    async def body(cluster: SimCluster) -> None:
        await asked(cluster, request("long", length=60))
        what, detail = told(cluster, "long")
        assert what == "offloaded"
        assert detail["uncached_tokens"] == detail["uncached_there"] == 60
        assert detail["offloaded_above"] == 0.75
        assert "its home lacks 1.00 of what" in detail["why"]

    in_cluster(CLUSTERS["1P1D"], body)


def test_a_short_one_is_not_and_the_threshold_is_told() -> None:
    async def body(cluster: SimCluster) -> None:
        await asked(cluster, request("short", length=12))
        what, detail = told(cluster, "short")
        assert what == "not offloaded"
        assert detail["why"] == "no more of it is to be computed than prompt_length_threshold"
        assert (detail["uncached_tokens"], detail["prompt_length_threshold"]) == (12, 12)

    in_cluster(CLUSTERS["1P1D"], body)


def test_neither_is_one_whose_log_probabilities_are_asked_for() -> None:
    async def body(cluster: SimCluster) -> None:
        await asked(cluster, request("told", length=60, prompt_logprobs=1))
        assert told(cluster, "told")[1]["why"] == "log-probabilities of the prompt are asked for"

    in_cluster(CLUSTERS["1P1D"], body)


def test_nor_one_of_which_the_home_lacks_much_less_than_others() -> None:
    """What its home computed alone, the prefill worker never saw."""

    async def body(cluster: SimCluster) -> None:
        first = request("first", length=60, prompt_logprobs=1)  # so its home computes it
        await asked(cluster, first)
        again = GenerateRequest(
            request_id="again", prompt=[*first.prompt, *[9] * 20], sampling=request("x").sampling
        )
        await asked(cluster, again)
        what, detail = told(cluster, "again")
        assert what == "not offloaded"
        assert detail["uncached_tokens"] <= 0.75 * detail["uncached_there"]
        assert detail["uncached_there"] == 80
        share = detail["uncached_tokens"] / detail["uncached_there"]
        assert detail["why"] == f"its home lacks {share:.2f} of what p does, soonest to prefill it"

    in_cluster(CLUSTERS["1P1D"], body)


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        (CLUSTERS["1P1D"], "no prefill worker has room"),
        ({"a": Role.BOTH}, "no other worker prefills for its home"),
        ({"a": Role.DECODE, "b": Role.DECODE}, "no other worker prefills for its home"),
    ],
)
def test_nor_where_nobody_could_compute_it(roles: dict[str, Role], why: str) -> None:
    async def body(cluster: SimCluster) -> None:
        names = [f"r{number}" for number in range(3)]
        await asyncio.gather(*(asked(cluster, request(name, length=60)) for name in names))
        assert told(cluster, names[-1])[1]["why"] == why

    split = SplitPolicy(prompt_length_threshold=12, prefill_queue_max=1)
    in_cluster(roles, body, options=GatewayOptions(split=split))


def test_nor_one_that_goes_on_after_its_first_token() -> None:
    async def body(cluster: SimCluster) -> None:
        stream = cluster.gateway.submit(request("r", length=60, max_tokens=30, ignore_eos=True))
        async with asyncio.timeout(60):
            await anext(stream)
            (journey,) = cluster.gateway.journeys.of("r")
            home = next(one.worker for one in journey.entries if one.what == "placed")
            await cluster.workers[home].crash()
            await collect(stream)
        whys = [one.detail["why"] for one in journey.entries if one.what == "not offloaded"]
        assert whys[-1] == "it goes on after its first token"

    in_cluster(CLUSTERS["2P2D"], body)


def test_an_idle_worker_was_heard_just_now_though_its_last_step_is_long_ago() -> None:
    async def body(cluster: SimCluster) -> None:
        await asked(cluster, request("first", length=60))
        await asyncio.sleep(200)
        await asked(cluster, request("second", length=60))
        (journey,) = cluster.gateway.journeys.of("second")
        (considered,) = journey.decisions[0].considered()
        assert considered.age_s is not None and considered.age_s > 199
        assert considered.heard_s_ago < 2.0

    in_cluster(CLUSTERS["1P1D"], body)
