"""Small random models of every family, made and saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MAX_LEN = 96
"""The longest sequence that is run, and the length that dynamic scaling is resolved for."""


def _shape(heads: int, kv_heads: int, head_dim: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 131,
        "hidden_size": heads * 8,
        "intermediate_size": 3 * heads * 8 + 4,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        **({} if head_dim is None else {"head_dim": head_dim}),
        **more,
    }


def _rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _llama(heads: int, kv_heads: int, head_dim: int | None = None, **more: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_shape(heads, kv_heads, head_dim, **more)))


def _mistral(heads: int, kv_heads: int, head_dim: int | None = None, **more: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_shape(heads, kv_heads, head_dim, **more)))


def _qwen2(heads: int, kv_heads: int, **more: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_shape(heads, kv_heads, **more)))


def _qwen3(heads: int, kv_heads: int, head_dim: int, **more: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_shape(heads, kv_heads, head_dim, **more)))


def _gemma3(heads: int, kv_heads: int, head_dim: int, **more: Any) -> PreTrainedModel:
    shape = _shape(heads, kv_heads, head_dim, **{"sliding_window": 24, **more})
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape))


def _gemma3_multimodal() -> PreTrainedModel:
    text = _shape(4, 2, 8, sliding_window=16, num_hidden_layers=6)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4,
            image_token_index=130, boi_token_index=129, eoi_token_index=128,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama 9 heads over 3, tied": lambda: _llama(9, 3, tie_word_embeddings=True),
    "llama 15 heads over 5, head size 12": lambda: _llama(15, 5, 12),
    "llama multi-query, head size 64": lambda: _llama(4, 1, 64),
    "llama every bias, gelu": lambda: _llama(
        4, 4, attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"
    ),
    "llama linear": lambda: _llama(4, 2, **_rope("linear", factor=3.0)),
    "llama dynamic": lambda: _llama(4, 2, **{**_rope("dynamic", factor=4.0), "max_position_embeddings": 24}),
    "llama llama3": lambda: _llama(
        4, 2, 16,
        **_rope("llama3", 5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64),
    ),
    "llama yarn": lambda: _llama(
        4, 2, 16, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "qwen2 yarn with mscale": lambda: _qwen2(
        4, 2,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.3, mscale_all_dim=0.7,
                truncate=False, beta_fast=16.0, beta_slow=2.0),
    ),
    "mistral sliding": lambda: _mistral(6, 2, sliding_window=20),
    "mistral full": lambda: _mistral(4, 2, 20, sliding_window=None),
    "qwen2 full, tied": lambda: _qwen2(7, 1, tie_word_embeddings=True, **_rope("default", 1e6)),
    "qwen2 sliding from layer 1": lambda: _qwen2(
        4, 2, use_sliding_window=True, sliding_window=17, max_window_layers=1
    ),
    "qwen3 5 heads over 1": lambda: _qwen3(5, 1, 24),
    "qwen3 biases, every other layer slides": lambda: _qwen3(
        4, 2, 16, attention_bias=True, use_sliding_window=True, sliding_window=8, num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma3 6 layers": lambda: _gemma3(4, 1, 16, num_hidden_layers=6, query_pre_attn_scalar=24),
    "gemma3 linear, capped, untied": lambda: _gemma3(
        3, 3, 8, num_hidden_layers=6, final_logit_softcapping=3.0, tie_word_embeddings=False,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "gemma3 capped scores": lambda: _gemma3(
        4, 2, 8, attn_logit_softcapping=2.0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3 multimodal": _gemma3_multimodal,
}  # fmt: skip


def make(name: str) -> PreTrainedModel:
    """The model, every parameter drawn so that leaving one out shows: norms around 1, biases around 0."""
    torch.manual_seed(sum(name.encode()))
    model = MODELS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3)
    return model
