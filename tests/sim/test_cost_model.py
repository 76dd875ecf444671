"""The cost of a step: against figures worked out by hand, and in which direction it must move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.sim.cost import DEVICES, MODELS, ModelShape, Rates, StepCost, device, model, rates_of

SMALL = ModelShape(
    "small", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocab=32, max_positions=99
)
RATES = Rates(
    linear_flops_per_s=1000.0,
    attention_flops_per_s=500.0,
    bytes_per_s=2000.0,
    kv_bytes_per_s=1600.0,
    step_s=0.25,
    row_s=0.125,
)


def test_counts_of_a_small_model_by_hand() -> None:
    # A layer: q and o 8 x 8 each, k and v 8 x 4 each, three of 8 x 16.
    assert SMALL.layer_weights == 2 * (64 + 64 + 32 + 32 + 3 * 128)
    assert SMALL.head_weights == 8 * 32
    assert SMALL.kv_bytes == 2 * 2 * 2 * 2 * 2  # keys and values, layers, kv heads, elements, bytes
    assert SMALL.pair_flops == 4 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [("llama-70b", 70.55, 327_680), ("llama-8b", 8.03, 131_072), ("smollm2-135m", 0.1628, 23_040)],
)
def test_counts_of_known_models(name: str, billions: float, kv_bytes: int) -> None:
    shape = MODELS[name]
    # Untied: embedding and output projection; SmolLM2 keeps one matrix, and 0.1345 billion are counted of it.
    assert (shape.layer_weights + 2 * shape.head_weights) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert shape.kv_bytes == kv_bytes


def test_decode_reads_weights_and_cache() -> None:
    cost = StepCost(SMALL, RATES)
    weights = (
        (1152 + 256) * 2 / 2000
    )  # reading them takes longer than 2 * 1152 and 2 * 256 operations at 1000/s
    flops = 2 * (1152 + 256) / 1000
    assert flops > weights  # this little machine computes more slowly than it reads
    attention = max(1 * (100 + 1) * 64 / 500, (100 + 2) * 32 / 1600)
    assert cost.seconds([(1, 100)]) == pytest.approx(0.25 + 0.125 + flops + attention)
    quick = StepCost(SMALL, replace(RATES, linear_flops_per_s=1e9, attention_flops_per_s=1e9))
    assert quick.seconds([(1, 100)]) == pytest.approx(0.25 + 0.125 + weights + 102 * 32 / 1600)


@pytest.mark.parametrize("rows", [[(1, 100)], [(16, 0)], [(4, 8), (1, 90)]])
def test_what_does_not_overlap_comes_on_top(rows: list[tuple[int, int]]) -> None:
    rates = replace(RATES, linear_flops_per_s=5000.0)
    tokens = sum(new for new, _ in rows)
    shorter = sum(
        min(2 * weights * positions / 5000, weights * 2 / 2000)
        for weights, positions in ((1152, tokens), (256, len(rows)))
    )
    roofline = StepCost(SMALL, rates).seconds(rows)
    for overlap in (0.0, 0.25, 1.0):
        cost = StepCost(SMALL, replace(rates, overlap=overlap))
        assert cost.seconds(rows) == pytest.approx(roofline + (1 - overlap) * shorter)
        assert cost.parts(rows).total_s == pytest.approx(cost.seconds(rows))
    with pytest.raises(ValueError, match="overlap must be between 0 and 1"):
        replace(rates, overlap=1.5)


def test_prompts_are_counted_pair_by_pair() -> None:
    cost = StepCost(SMALL, RATES)
    pairs = sum(10 + i for i in range(1, 6))  # five new positions after ten: each sees itself and all before
    attention = pairs * 64 / 500
    linear = 5 * 2 * 1152 / 1000 + 2 * 256 / 1000
    assert cost.seconds([(5, 10)]) == pytest.approx(0.25 + 0.125 + linear + attention)


def test_devices_share_work_and_pay_for_it() -> None:
    linked = replace(RATES, link_bytes_per_s=100.0, all_reduce_s=0.01)
    alone, two = StepCost(SMALL, linked), StepCost(SMALL, linked, devices=2)
    one, shared = alone.parts([(4, 0)]), two.parts([(4, 0)])
    assert one.all_reduce_s == 0
    assert shared.linear_s == pytest.approx(one.linear_s / 2)
    assert shared.attention_s == pytest.approx(one.attention_s / 2)
    # Two all-reduces in each of two layers: latency, and 2 * (2 - 1) / 2 of 4 * 8 elements of 2 bytes.
    assert shared.all_reduce_s == pytest.approx(4 * (0.01 + 4 * 8 * 2 / 100))
    assert two.seconds([(4, 0)]) == pytest.approx(shared.total_s)


def test_more_devices_than_kv_heads_keep_copies() -> None:
    quick = replace(RATES, linear_flops_per_s=1e12, attention_flops_per_s=1e12)
    two, four = StepCost(SMALL, quick, 2), StepCost(SMALL, quick, 4)
    assert four.parts([(1, 50)]).attention_s == two.parts([(1, 50)]).attention_s
    assert two.memory_bytes(50) - two.memory_bytes(0) == four.memory_bytes(50) - four.memory_bytes(0)


def test_a_step_of_nothing_takes_nothing() -> None:
    assert StepCost(SMALL, RATES).seconds([]) == 0.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="4 heads of small cannot be shared out to 3"):
        StepCost(SMALL, RATES, 3)
    with pytest.raises(ValueError, match="bytes_per_s must be above 0, got 0"):
        replace(RATES, bytes_per_s=0)
    with pytest.raises(ValueError, match="there is no device 'h300'; there are a100, h100, h200"):
        device("h300")
    with pytest.raises(ValueError, match="there is no model shape 'x'"):
        model("x")


def test_shapes_from_configurations() -> None:
    config = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    assert ModelShape.from_config("smollm2-135m", config) == MODELS["smollm2-135m"]
    with pytest.raises(ValueError, match="sliding windows"):
        ModelShape.from_config("g", {**config, "layer_types": ["sliding_attention"]})
    with pytest.raises(ValueError, match="experts"):
        ModelShape.from_config("m", {**config, "num_experts": 8})
    with pytest.raises(ValueError, match="no field 'hidden_size'"):
        ModelShape.from_config("b", {key: config[key] for key in config if key != "hidden_size"})


ROWS = st.lists(st.tuples(st.integers(1, 600), st.integers(0, 20_000)), min_size=1, max_size=40)
COSTS = st.sampled_from(
    [
        StepCost(MODELS[name], rates_of(DEVICES[on]), devices)
        for name, devices in (("llama-70b", 8), ("llama-8b", 1), ("smollm2-135m", 1))
        for on in DEVICES
    ]
)


@given(COSTS, ROWS, st.data())
def test_more_of_anything_takes_longer(
    cost: StepCost, rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    base = cost.seconds(rows)
    assert math.isfinite(base)
    assert cost.parts(rows).total_s == pytest.approx(base)
    i = data.draw(st.integers(0, len(rows) - 1))
    new, context = rows[i]
    assert cost.seconds([*rows, (1, 0)]) > base
    assert cost.seconds([*rows[:i], (new + 1, context), *rows[i + 1 :]]) > base
    assert cost.seconds([*rows[:i], (new, context + 1), *rows[i + 1 :]]) > base
    # What two steps take, one step of both takes at most: it reads the weights once.
    assert base <= cost.seconds(rows[:i]) + cost.seconds(rows[i:]) + 1e-12


@given(ROWS)
def test_a_quicker_device_is_never_slower(rows: list[tuple[int, int]]) -> None:
    times = [
        StepCost(MODELS["llama-8b"], rates_of(DEVICES[name])).seconds(rows)
        for name in ("a100", "h100", "h200")
    ]
    assert times == sorted(times, reverse=True)
