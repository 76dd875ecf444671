"""Workers of different hardware in one pool: work goes to each by its measured speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.protocol.messages import Role
from headrace.sim.cost import StepCost, device, model, rates_of
from headrace.sim.fleet import PLANNED, Fleet, FleetOptions, simulate
from headrace.sim.fleet_result import FleetResult
from headrace.sim.modelled_executor import ModelledExecutor
from headrace.sim.trace import Arrival, Piece

FAST, SLOW = (StepCost(model("llama-8b"), rates_of(device(name))) for name in ("h100", "a100"))
FLEET = FleetOptions(cost=FAST, prefill=2, decode=1, cache_tokens=1_000_000, max_model_len=32_768)
PROMPT = 8_192
SHARE = SLOW.prefill_seconds(PROMPT, 0, 8192) / (
    SLOW.prefill_seconds(PROMPT, 0, 8192) + FAST.prefill_seconds(PROMPT, 0, 8192)
)
"""Of all prompts, that go to the fast one when both work all the time."""
CAPACITY = 1 / FAST.prefill_seconds(PROMPT, 0, 8192) + 1 / SLOW.prefill_seconds(PROMPT, 0, 8192)
"""Prompts a second."""
LOAD = [Arrival(f"r{i}", i / (0.85 * CAPACITY), (Piece(i, PROMPT),), 4) for i in range(150)]


def served(policy: str) -> FleetResult:
    async def unequal(fleet: Fleet) -> None:
        engine = fleet.cluster.workers["prefill0"].engine
        assert engine is not None
        assert isinstance(engine.executor, ModelledExecutor)
        engine.executor.cost = SLOW

    routing = replace(PLANNED.routing, policy=policy)
    return simulate(LOAD, replace(FLEET, gateway=replace(PLANNED, routing=routing)), prepare=unequal)


def share_of_fast(result: FleetResult) -> float:
    tokens = {name: use.tokens for name, use in result.workers.items() if use.role is Role.PREFILL}
    return tokens["prefill1"] / sum(tokens.values())


@pytest.fixture(scope="module")
def by_turns() -> FleetResult:
    return served("round_robin")


def late_s(result: FleetResult) -> float:
    return result.quantiles(lambda one: one.ttft_s, [0.95])[0]


@pytest.mark.parametrize("policy", ["capacity", "cost", "latency"])
def test_nobody_waits_for_a_slow_worker_while_a_fast_one_would_be_sooner(
    policy: str, by_turns: FleetResult
) -> None:
    result = served(policy)
    assert share_of_fast(by_turns) == pytest.approx(0.5, abs=0.01)
    assert late_s(result) < 0.1 * late_s(by_turns)
    if (
        policy != "latency"
    ):  # which gives the fast one more, until its queue takes longer than the other's prefill
        assert share_of_fast(result) == pytest.approx(SHARE, abs=0.07)
