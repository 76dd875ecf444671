"""Llama (1 to 3.2 and what shares its form) and Mistral, which adds a sliding window to every layer."""

from __future__ import annotations

from headrace.models.config import LayerKind, ModelConfig, require
from headrace.models.families.family import Family
from headrace.models.families.fields import Fields, rotary_and_positions


def _read(fields: Fields, *, window: int | None, attention_bias: bool, mlp_bias: bool) -> ModelConfig:
    fields.refuse_foreign_arithmetic()
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    head_dim = fields.optional_integer("head_dim") or hidden // heads
    rotary, positions = rotary_and_positions(fields)
    return ModelConfig(
        hidden_size=hidden,
        heads=heads,
        kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        layer_kinds=(LayerKind(window, rotary),) * fields.integer("num_hidden_layers"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_offset=0.0,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=False,
        post_norms=False,
        embedding_scale=1.0,
        attention_scale=head_dim**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        activation=fields.activation("hidden_act", "silu"),
        max_positions=positions,
    )


def _read_llama(fields: Fields) -> ModelConfig:
    # Checkpoints of other families that were renamed to Llama keep these; Llama's definition has no window.
    fields.refuse_unless("sliding_window", None)
    slides = fields.layer_types(fields.integer("num_hidden_layers"))
    require(
        not slides or not any(slides),
        "layer_types",
        "sliding_attention",
        "full_attention (Llama has no sliding layers)",
    )
    return _read(
        fields,
        window=None,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _read_mistral(fields: Fields) -> ModelConfig:
    fields.refuse_unless("attention_bias", None, False)
    fields.refuse_unless("mlp_bias", None, False)
    if "num_key_value_heads" not in fields:
        fields.integer("num_key_value_heads")
    window = fields.optional_integer("sliding_window", 4096)
    slides = fields.layer_types(fields.integer("num_hidden_layers"))
    require(
        slides is None or set(slides) == {window is not None},
        "layer_types",
        fields.value("layer_types", None),
        "one kind for all layers, as sliding_window says (Mistral has no alternating layers)",
    )
    return _read(fields, window=window, attention_bias=False, mlp_bias=False)


LLAMA = Family(("LlamaForCausalLM",), ("llama",), _read_llama)
MISTRAL = Family(("MistralForCausalLM",), ("mistral",), _read_mistral)
