"""Gemma 3, text only: sliding and full layers with rotary bases of their own, norms on both sides of a block.

The text model of a multimodal checkpoint is read from `text_config`; its vision tower is left out.
Defaults are those of the published definition, since published files leave most fields out.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.models.config import (
    LayerKind,
    ModelConfig,
    Rotary,
    UnsupportedModelError,
    require,
)
from headrace.models.families.family import Family, WeightNames
from headrace.models.families.fields import Fields, read_rotary

_LAYERS_PER_FULL_LAYER = 6
_THETA_FULL = 1_000_000.0
_THETA_SLIDING = 10_000.0


def _rotary_pair(fields: Fields, positions: int) -> tuple[Rotary, Rotary]:
    """Settings of the full and of the sliding layers, from either spelling."""
    theta_full = fields.number("rope_theta", _THETA_FULL)
    theta_sliding = fields.number("rope_local_base_freq", _THETA_SLIDING)
    scaling, parameters = fields.at_most_one("rope_scaling", "rope_parameters")
    if parameters is None:
        empty = Fields({}, fields.name("rope_parameters."))
        return (
            read_rotary(scaling or empty, theta=theta_full, positions=positions),
            read_rotary(empty, theta=theta_sliding, positions=positions),
        )
    parameters.refuse_others(frozenset({"full_attention", "sliding_attention"}))
    empty = Fields({}, parameters.name(""))
    return (
        read_rotary(parameters.nested("full_attention") or empty, theta=theta_full, positions=positions),
        read_rotary(
            parameters.nested("sliding_attention") or empty, theta=theta_sliding, positions=positions
        ),
    )


def _slides(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers slide: all but every sixth, unless the config says otherwise."""
    listed = fields.layer_types(layers)
    if listed is not None:
        return listed
    pattern = fields.integer(
        "sliding_window_pattern", fields.value("_sliding_window_pattern", _LAYERS_PER_FULL_LAYER)
    )
    require(pattern > 0, fields.name("sliding_window_pattern"), pattern, "a positive integer")
    return tuple((index + 1) % pattern != 0 for index in range(layers))


def _read(fields: Fields) -> ModelConfig:
    fields.refuse_foreign_arithmetic()
    fields.refuse_unless("mlp_bias", None, False)
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads", 8)
    positions = fields.integer("max_position_embeddings", 131_072)
    full, sliding = _rotary_pair(fields, positions)
    slides = _slides(fields, layers)
    window = fields.optional_integer("sliding_window", 4096)
    require(
        window is not None or not any(slides),
        fields.name("sliding_window"),
        window,
        "a positive integer where layers slide",
    )
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        hidden_size=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size", 262_208),
        layer_kinds=tuple(LayerKind(window, sliding) if slide else LayerKind(None, full) for slide in slides),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        post_norms=True,
        embedding_scale=hidden**0.5,
        attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        max_positions=positions,
    )


def _read_multimodal(fields: Fields) -> ModelConfig:
    text = fields.nested("text_config")
    if text is None:
        raise UnsupportedModelError("config.json: text_config is missing")
    fields.refuse_foreign_arithmetic()
    # The outer flag is the one that counts: embeddings are tied in the whole, not in the text model.
    return replace(_read(text), tied_embeddings=fields.flag("tie_word_embeddings", True))


_NAMES = WeightNames(
    ffn_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

GEMMA3_TEXT = Family(("Gemma3ForCausalLM",), ("gemma3_text",), _read, _NAMES)
GEMMA3 = Family(
    ("Gemma3ForConditionalGeneration",),
    ("gemma3",),
    _read_multimodal,
    replace(
        _NAMES,
        prefixes=("language_model.model.", "model.language_model."),
        heads=("language_model.lm_head.weight", "lm_head.weight"),
        foreign=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    ),
)
