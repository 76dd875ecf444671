"""Qwen 2 and 2.5: Llama's form with biases on q, k and v, and sliding upper layers where asked."""

from __future__ import annotations

from headrace.models.config import LayerKind, ModelConfig, Rotary, require
from headrace.models.families.family import Family
from headrace.models.families.fields import Fields, rotary_and_positions


def layer_kinds(fields: Fields, rotary: Rotary) -> tuple[LayerKind, ...]:
    """Qwen's choice of layers: `layer_types`, else those from `max_window_layers` on slide.

    A window counts only where `use_sliding_window` is set.
    """
    layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    slides = fields.layer_types(layers)
    if slides is None:
        first = fields.integer("max_window_layers", 28) if window is not None else layers
        slides = tuple(index >= first for index in range(layers))
    require(
        window is not None or not any(slides),
        "layer_types",
        "sliding_attention",
        "full_attention where use_sliding_window is false or sliding_window is null",
    )
    return tuple(LayerKind(window if slide else None, rotary) for slide in slides)


def _read(fields: Fields) -> ModelConfig:
    fields.refuse_foreign_arithmetic()
    fields.refuse_unless("attention_bias", None, True)
    fields.refuse_unless("mlp_bias", None, False)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    head_dim = fields.optional_integer("head_dim") or hidden // heads
    rotary, positions = rotary_and_positions(fields)
    return ModelConfig(
        hidden_size=hidden,
        heads=heads,
        kv_heads=fields.optional_integer("num_key_value_heads", 32) or heads,
        head_dim=head_dim,
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        layer_kinds=layer_kinds(fields, rotary),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_offset=0.0,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        post_norms=False,
        embedding_scale=1.0,
        attention_scale=head_dim**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        activation=fields.activation("hidden_act", "silu"),
        max_positions=positions,
    )


QWEN2 = Family(("Qwen2ForCausalLM",), ("qwen2",), _read)
