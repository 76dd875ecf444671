"""Qwen 3: an RMS norm over each head of q and k instead of biases, and a head size of its own."""

from __future__ import annotations

from headrace.models.config import ModelConfig
from headrace.models.families.family import Family
from headrace.models.families.fields import Fields, rotary_and_positions
from headrace.models.families.qwen2 import layer_kinds


def _read(fields: Fields) -> ModelConfig:
    fields.refuse_foreign_arithmetic()
    fields.refuse_unless("mlp_bias", None, False)
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", 128)
    rotary, positions = rotary_and_positions(fields)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        hidden_size=fields.integer("hidden_size"),
        heads=heads,
        kv_heads=fields.optional_integer("num_key_value_heads", 32) or heads,
        head_dim=head_dim,
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        layer_kinds=layer_kinds(fields, rotary),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_offset=0.0,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        post_norms=False,
        embedding_scale=1.0,
        attention_scale=head_dim**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        activation=fields.activation("hidden_act", "silu"),
        max_positions=positions,
    )


QWEN3 = Family(("Qwen3ForCausalLM",), ("qwen3",), _read)
