"""Rotary tables against transformers', up to positions where float32 angles are coarse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headrace.models import read_config
from headrace.models.rotary import cos_sin_table

LENGTH = 5000
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn untruncated": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("name", SETTINGS)
def test_tables_equal_transformers(name: str, head_dim: int) -> None:
    settings = dict(SETTINGS[name])
    values = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 8,
        "max_position_embeddings": 2048,
        "rope_parameters": settings,
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{**values, "rope_parameters": dict(settings)}))
    cos, sin = theirs(torch.empty(1), torch.arange(LENGTH)[None])
    ours = cos_sin_table(
        read_config({**values, "architectures": ["LlamaForCausalLM"]}).layer_kinds[0].rotary, head_dim, LENGTH
    )
    assert ours.dtype == torch.float32
    expected = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=1)
    worst = (ours - expected).abs().max().item()
    # A frequency may differ in its last place, and an angle by that times the position.
    assert worst <= LENGTH * 2.0**-22, f"differs by {worst:.1e}"


def test_dynamic_scaling_is_resolved_for_the_served_length() -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 8,
        "max_position_embeddings": 128,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    }
    rotary = read_config(values).layer_kinds[0].rotary
    unscaled = read_config({**values, "rope_scaling": None}).layer_kinds[0].rotary
    assert torch.equal(cos_sin_table(rotary, 16, 128), cos_sin_table(unscaled, 16, 128))
    assert not torch.equal(cos_sin_table(rotary, 16, 256)[:128], cos_sin_table(rotary, 16, 128))
