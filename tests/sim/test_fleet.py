"""A planning simulation: small fleets of modelled workers under traces, from the gateway down."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from headrace.cluster.facts import Fact
from headrace.cluster.options import AdmissionOptions, ServiceLevels, SplitPolicy
from headrace.protocol.messages import Role
from headrace.sim.cost import StepCost, device, model, rates_of
from headrace.sim.fleet import PLANNED, Fleet, FleetOptions, simulate
from headrace.sim.fleet_result import FleetResult, Served, WorkerUse
from headrace.sim.ideal_cache import IdealCache
from headrace.sim.trace import Arrival, Piece, Sessions

COST = StepCost(model("llama-8b"), rates_of(device("h100")))
FLEET = FleetOptions(cost=COST, prefill=2, decode=2, cache_tokens=100_000, max_model_len=32_768)
LOAD = Sessions(rate=3.0, system_length=1024, turn_length=600, output_length=60, gap_s=5.0).arrivals(
    40, 3, 32_768
)


@pytest.fixture(scope="module")
def result() -> FleetResult:
    return simulate(LOAD, FLEET)


def test_every_request_is_served_as_long_as_it_asks(result: FleetResult) -> None:
    assert [one.name for one in result.requests] == [arrival.name for arrival in LOAD]
    for one, arrival in zip(result.requests, LOAD, strict=True):
        assert one.complete, one
        assert one.output_tokens == arrival.output_length
        assert one.prompt_tokens == arrival.input_length
        assert 0 < one.ttft_s < one.e2e_s < 60
        assert one.home.startswith("decode")


def test_prompts_are_offloaded_and_their_blocks_travel(result: FleetResult) -> None:
    offloaded = [one for one in result.requests if one.prefill]
    assert all(one.prefill.startswith("prefill") for one in offloaded)
    assert len(offloaded) >= len(LOAD) // 2
    sent = sum(use.sent_bytes for use in result.workers.values() if use.role is Role.PREFILL)
    least, block = min(one.prompt_tokens - one.cached_tokens for one in offloaded), COST.shape.kv_bytes * 512
    assert sent >= len(offloaded) * max(1, least // 512) * block
    assert sent % block == 0
    assert result.offloaded == len(offloaded) / len(LOAD)


def test_a_prompt_counts_at_its_prefill_worker_while_its_home_has_yet_to_reserve() -> None:
    seen: list[float] = []

    async def prepare(fleet: Fleet) -> None:
        def unseen() -> float:
            members = fleet.gateway.registry.live()
            return sum(one.facts[Fact.UNSEEN] for one in members if one.info.role is Role.PREFILL)

        stream = fleet.gateway.submit(Arrival("r", 0.0, (Piece(1, 3_000),), 4).request(32_000))
        seen.append(unseen())  # before anybody heard of it
        stream.close()
        await asyncio.sleep(1.0)
        seen.append(unseen())

    simulate(LOAD[:1], FLEET, prepare=prepare)
    assert seen == [3_000, 0]


def test_a_home_that_holds_more_of_a_prompt_than_prefill_workers_computes_it() -> None:
    """The only prefill worker has computed so much since that it holds nothing of it any more."""
    first = Arrival("first", 0.0, (Piece(1, 10_240),), 8)
    others = [Arrival(f"r{i}", 5.0, (Piece(10 + i, 10_240),), 8) for i in range(4)]
    again = Arrival("again", 60.0, (*first.pieces, Piece(2, 2_000)), 8)
    fleet = replace(FLEET, prefill=1, cache_tokens=45_000)
    served = {one.name: one for one in simulate([first, *others, again], fleet).requests}
    assert all(served[arrival.name].prefill for arrival in (first, *others))
    assert served["again"].home == served["first"].home
    assert not served["again"].prefill
    assert served["again"].cached_tokens == 10_240


def test_sessions_find_what_they_said_before(result: FleetResult) -> None:
    assert result.hit_rate > 0.3
    first = [one for one in result.requests if one.name.endswith("-0")]
    later = [one for one in result.requests if not one.name.endswith("-0")]
    assert max(one.cached_tokens for one in later) > max(one.cached_tokens for one in first)


def test_a_lone_request_takes_what_the_hardware_takes() -> None:
    alone = [Arrival("r", 0.0, (Piece(1, 20_000),), 41)]
    (one,) = simulate(alone, replace(FLEET, stride=1)).requests
    prefill_s = COST.prefill_seconds(20_000, 0, FLEET.max_num_batched_tokens)
    # Beside: messages, each a tenth of a millisecond, of which prompts are some ten thousand bytes.
    assert one.ttft_s == pytest.approx(prefill_s, abs=2e-3)
    decode_s = sum(COST.seconds([(1, 20_000 + i)]) for i in range(40))
    transfer_s = 20_000 * COST.shape.kv_bytes / FLEET.nic_bytes_per_s
    # Blocks travel while the prompt is computed; those of the last chunk come after it.
    assert decode_s < one.e2e_s - one.ttft_s < decode_s + transfer_s + 40 * 2e-4


def test_narrow_adapters_hold_transfers_up() -> None:
    prompts = [Arrival(f"r{i}", 0.0, (Piece(i, 16_384),), 8) for i in range(8)]
    roomy = replace(FLEET, cache_tokens=400_000)  # or prompts would wait for leased blocks
    wide = simulate(prompts, roomy)
    narrow = simulate(prompts, replace(roomy, nic_bytes_per_s=2e9))
    assert [one.ttft_s for one in narrow.requests] == pytest.approx([one.ttft_s for one in wide.requests])
    seconds = 8 * 16_384 * COST.shape.kv_bytes / (2 * 2e9)  # two workers send
    assert narrow.duration_s > seconds > wide.duration_s


def test_runs_are_the_same_when_they_are_repeated(result: FleetResult) -> None:
    again = simulate(LOAD, FLEET)
    assert again.trace_hash == result.trace_hash
    assert again.requests == result.requests
    assert again.workers == result.workers


def test_strides_change_times_little(result: FleetResult) -> None:
    exact = simulate(LOAD, replace(FLEET, stride=1))
    assert exact.trace_hash != result.trace_hash
    (quick,), (slow,) = (one.quantiles(lambda served: served.tpot_s, [0.5]) for one in (result, exact))
    assert quick == pytest.approx(slow, rel=0.1)


def test_workers_of_both_roles_need_no_transfers() -> None:
    whole = simulate(LOAD, replace(FLEET, prefill=0, decode=0, both=3))
    assert all(one.complete and not one.prefill for one in whole.requests)
    assert all(use.sent_bytes == 0 for use in whole.workers.values())
    gateway = replace(PLANNED, split=SplitPolicy(prompt_length_threshold=1 << 20))
    kept = simulate(LOAD, replace(FLEET, gateway=gateway))
    assert kept.offloaded == 0


def test_an_ideal_cache_spares_what_any_worker_has_computed() -> None:
    # Four workers that do both take these in turn; the second halves are their own.
    prompts = [Arrival(f"r{i}", 2.0 * i, (Piece(1, 4096), Piece(10 + i, 4096)), 2) for i in range(4)]
    together = replace(FLEET, prefill=0, decode=0, both=4)
    alone = simulate(prompts, together)
    shared = simulate(prompts, replace(together, ideal_cache=True))
    assert shared.requests[0].ttft_s == pytest.approx(alone.requests[0].ttft_s)
    half_s = COST.prefill_seconds(4096, 4096, FLEET.max_num_batched_tokens)
    for one in shared.requests[1:]:
        assert one.ttft_s == pytest.approx(half_s, abs=2e-3)
        assert one.cached_tokens == 4096


@pytest.mark.parametrize("pools", [{"both": 2}, {"prefill": 1, "decode": 1}])
def test_nobody_is_refused_for_what_is_taken_for_granted_of_workers_that_were_never_tried(
    pools: dict[str, int],
) -> None:
    # 215 ms by what is taken for granted of any worker; these take a third of that.
    load = [Arrival(f"r{i}", 1.0 * i, (Piece(10 + i, 2048),), 16) for i in range(12)]
    gateway = replace(
        PLANNED,
        admission=AdmissionOptions(early_rejection=True, reject_on_slo_violation=True),
        slo=ServiceLevels(ttft_s=0.15, tpot_s=0.05),
    )
    fleet = FleetOptions(
        cost=COST, cache_tokens=100_000, max_model_len=32_768, stride=1, gateway=gateway, **pools
    )
    assert [one.name for one in simulate(load, fleet).requests if not one.complete] == []


def test_pools_of_an_ideal_cache_have_what_any_of_them_was_given() -> None:
    cache = IdealCache()
    first, second = cache.pool(4), cache.pool(4)
    for number in range(3):
        (block,) = first.take(1)
        first.publish(block, bytes([number]))
    assert (second.cached, second.free, second.held) == (3, 1, 0)
    assert len(second.take_events()) == 3  # told to gateways as its own
    second.take(4)
    (block,) = first.take(1)
    first.publish(block, b"x")
    assert second.find(b"x") is None  # all its blocks are in use
    for pool in (first, second):
        pool.check()


def test_what_one_pool_uses_stays_in_all() -> None:
    cache = IdealCache()
    here, there = cache.pool(3), cache.pool(3)
    for name in (b"hot", b"cold", b"old"):
        (block,) = here.take(1)
        here.publish(block, name)
        here.release([block])
    hot = here.find(b"hot")
    assert hot is not None
    here.hold([hot])
    here.release([hot])
    there.take(2)  # the two that were used longest ago
    assert there.find(b"hot") is not None
    assert there.find(b"cold") is there.find(b"old") is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no worker decodes"):
        FleetOptions(cost=COST, prefill=3)
    with pytest.raises(ValueError, match="holds no block of 512"):
        FleetOptions(cost=COST, both=1, cache_tokens=100)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        FleetOptions(cost=COST, both=1, stride=0)


def test_figures_of_a_result_by_hand() -> None:
    served = [
        Served("a", 0.0, 100, "length", 11, 50, 0.1, 1.1, "d", "p"),  # 0.1 s a token
        Served("b", 1.0, 100, "length", 1, 0, 0.5, 0.5, "d"),
        Served("c", 2.0, 100, "length", 11, 100, 2.0, 2.5, "d"),  # late
        Served("d", 3.0, 100, "overloaded"),
    ]
    use = WorkerUse(Role.DECODE, 2.0, 10, 100, 0.0, 0, 0, 0)
    figures = FleetResult(tuple(served), {"d": use}, 8.0, "", 0.0)
    assert figures.span_s == 4.0  # four requests with gaps of a second
    assert figures.goodput(1.0, 0.1) == pytest.approx(2 / 4)
    assert figures.goodput(1.0, 0.05) == pytest.approx(1 / 4)
    assert figures.attainment(3.0, 1.0) == 0.75
    assert figures.hit_rate == 0.5
    assert figures.offloaded == pytest.approx(1 / 3)
    assert figures.utilisation(Role.DECODE) == 0.25
    assert figures.utilisation(Role.PREFILL) == 0.0
    assert figures.quantiles(lambda one: one.ttft_s, [0.5, 0.99]) == [0.5, 2.0]
    assert figures.between(1.0, 3.0).requests == tuple(served[1:3])
    assert math.isnan(figures.between(3.0).quantiles(lambda one: one.ttft_s, [0.5])[0])
