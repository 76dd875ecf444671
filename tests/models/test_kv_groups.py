"""Groups of layers that share pages of one size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.models import KVGroup, kv_groups, read_config
from headrace.models.config import DefaultRotary, LayerKind, ModelConfig

CONFIG = read_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
)
ROTARY = DefaultRotary(10000.0)


def _with(windows: list[int | None]) -> ModelConfig:
    return replace(CONFIG, layer_kinds=tuple(LayerKind(window, ROTARY) for window in windows))


def test_one_kind_is_one_group() -> None:
    assert kv_groups(_with([None] * 4)) == (KVGroup(None, (0, 1, 2, 3)),)
    assert kv_groups(_with([7] * 3)) == (KVGroup(7, (0, 1, 2)),)


def test_gemma_3_270m_has_one_full_group_and_five_sliding() -> None:
    groups = kv_groups(_with(([512] * 5 + [None]) * 3))
    assert groups[0] == KVGroup(None, (5, 11, 17))
    assert [group.window for group in groups[1:]] == [512] * 5
    assert [len(group.layers) for group in groups] == [3] * 6


@pytest.mark.parametrize(
    "windows",
    [[None, 8], [8, None, 8], [None] * 4 + [8] * 6, [16, 8, None, 8, 16, None], [8] * 7 + [None] * 5],
)
def test_groups_hold_each_layer_once_and_are_of_one_size_and_window(windows: list[int | None]) -> None:
    groups = kv_groups(_with(windows))
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert len({len(group.layers) for group in groups}) == 1
    for group in groups:
        assert {windows[layer] for layer in group.layers} == {group.window}
        assert list(group.layers) == sorted(group.layers)
