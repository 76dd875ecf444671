"""Reading config.json: published configurations, both spellings, and refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from headrace.models import ModelConfig, UnsupportedModelError, read_config
from headrace.models.config import (
    DefaultRotary,
    DynamicRotary,
    LayerKind,
    LinearRotary,
    Llama3Rotary,
    YarnRotary,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
GEMMA3 = {**LLAMA, "architectures": ["Gemma3ForCausalLM"]}


def _windows(config: ModelConfig) -> list[int | None]:
    return [kind.window for kind in config.layer_kinds]


# ---- published configurations ------------------------------------------------------------------------


def test_llama_3_1_8b() -> None:
    config = read_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert (config.head_dim, config.kv_heads, config.max_positions) == (128, 8, 131072)
    assert config.layer_kinds == (LayerKind(None, Llama3Rotary(500000.0, 8.0, 1.0, 4.0, 8192)),) * 32
    assert config.attention_scale == 128**-0.5


def test_mistral_7b_slides_in_every_layer() -> None:
    assert _windows(read_config({**MISTRAL, "sliding_window": 4096})) == [4096] * 8
    assert _windows(read_config({**MISTRAL, "sliding_window": None})) == [None] * 8


def test_qwen2_slides_from_max_window_layers_on_where_asked() -> None:
    published = {**QWEN2, "max_window_layers": 6, "sliding_window": 32768, "use_sliding_window": False}
    assert _windows(read_config(published)) == [None] * 8
    assert _windows(read_config({**published, "use_sliding_window": True})) == [None] * 6 + [32768] * 2
    listed = {
        **published,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    }
    assert _windows(read_config(listed)) == [32768, None] * 4
    assert read_config(published).qkv_bias and not read_config(published).o_bias


def test_qwen3_has_a_head_size_of_its_own() -> None:
    config = read_config({**QWEN3, "head_dim": 128})
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)


def test_gemma_3_4b_from_the_few_fields_of_its_text_config() -> None:
    config = read_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        }
    )
    full = LayerKind(None, LinearRotary(1_000_000.0, 8.0))
    sliding = LayerKind(1024, DefaultRotary(10_000.0))
    assert config.layer_kinds == ((sliding,) * 5 + (full,)) * 5 + (sliding,) * 4
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert (config.norm_offset, config.tied_embeddings, config.post_norms) == (1.0, True, True)
    assert (config.embedding_scale, config.attention_scale) == (2560**0.5, 256**-0.5)
    assert config.max_positions == 131_072


def test_gemma_3_reads_its_caps_and_its_older_pattern() -> None:
    config = read_config(
        {
            **GEMMA3,
            "sliding_window_pattern": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30,
            "sliding_window": 512,
        }
    )
    assert _windows(config) == [512, 512, 512, None] * 2
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)


# ---- rotary settings in both spellings ---------------------------------------------------------------

SCALINGS = {
    "linear": ({"factor": 2.0}, LinearRotary(5e5, 2.0), 8192),
    "dynamic": ({"factor": 4.0}, DynamicRotary(5e5, 4.0, 4096), 16384),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        Llama3Rotary(5e5, 8.0, 1.0, 4.0, 512),
        4096,
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.25},
        YarnRotary(5e5, 4.0, 2048, 32.0, 1.0, 1.25, True),
        8192,
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_settings_in_both_spellings(kind: str) -> None:
    scaling, rotary, positions = SCALINGS[kind]
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": kind, **scaling}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **scaling}},
    ]
    for spelling in spellings:
        config = read_config({**LLAMA, **spelling})
        assert config.layer_kinds[0].rotary == rotary
        assert config.max_positions == positions


def test_gemma_rotary_settings_in_both_spellings() -> None:
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }
    }
    assert read_config({**GEMMA3, **old}) == read_config({**GEMMA3, **new})
    assert read_config({**GEMMA3, **old}).layer_kinds[0].rotary == DefaultRotary(3e4)


def test_yarn_defaults_follow_the_paper_and_deepseek() -> None:
    def factor(**more: float) -> float:
        rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, **more}
        rotary = read_config({**LLAMA, "rope_scaling": rope}).layer_kinds[0].rotary
        assert isinstance(rotary, YarnRotary)
        return rotary.attention_factor

    assert factor() == pytest.approx(1.2772588722)  # 0.1 ln 16 + 1
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0


# ---- against transformers' own reading ---------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3], ids=lambda v: v["architectures"][0]
)
def test_absent_fields_mean_what_they_mean_to_transformers(values: dict[str, Any]) -> None:
    config = read_config(values)
    theirs = getattr(transformers, values["architectures"][0]).config_class(**values)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert (
        config.head_dim == getattr(theirs, "head_dim", None)
        or theirs.hidden_size // theirs.num_attention_heads
    )
    assert config.max_positions == theirs.max_position_embeddings
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    slides = [kind == "sliding_attention" for kind in kinds] if kinds else [window is not None] * 8
    assert _windows(config) == [window if slide else None for slide in slides]
    for slide, kind in zip(slides, config.layer_kinds, strict=True):
        rope = theirs.rope_parameters
        rope = rope.get("sliding_attention" if slide else "full_attention", rope)
        assert kind.rotary == DefaultRotary(rope["rope_theta"])


# ---- refusals ----------------------------------------------------------------------------------------

REFUSED = {
    "missing field": (LLAMA, {"hidden_size": ...}, "hidden_size is missing"),
    "wrong type": (LLAMA, {"hidden_size": "64"}, "hidden_size is '64'; supported: an integer"),
    "true is no integer": (LLAMA, {"vocab_size": True}, "vocab_size is True"),
    "no layers": (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "kv heads": (
        LLAMA,
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3.*divisor of num_attention_heads",
    ),
    "odd head": (LLAMA, {"head_dim": 15}, "head_dim is 15.*even"),
    "activation": (LLAMA, {"hidden_act": "relu"}, "hidden_act is 'relu'; supported: silu"),
    "exact gelu": (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "quantised": (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "partial rotary": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "interleaved": (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    "llama window": (LLAMA, {"sliding_window": 128}, "sliding_window is 128"),
    "llama layer types": (
        LLAMA,
        {"layer_types": ["sliding_attention"] * 8},
        "layer_types is 'sliding_attention'",
    ),
    "mistral bias": (MISTRAL, {"attention_bias": True}, "attention_bias is True"),
    "mistral kv heads": (MISTRAL, {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
    "mistral alternating": (
        MISTRAL,
        {"layer_types": ["full_attention", "sliding_attention"] * 4},
        "layer_types",
    ),
    "qwen2 without bias": (QWEN2, {"attention_bias": False}, "attention_bias is False"),
    "qwen3 mlp bias": (QWEN3, {"mlp_bias": True}, "mlp_bias is True"),
    "slides without window": (
        QWEN2,
        {"layer_types": ["sliding_attention"] * 8},
        "layer_types is 'sliding_attention'; supported: full_attention where use_sliding_window",
    ),
    "layer types": (QWEN2, {"layer_types": ["chunked_attention"] * 8}, "layer_types is 'chunked_attention'"),
    "layer count": (QWEN2, {"layer_types": ["full_attention"]}, "one entry for each of 8 layers"),
    "zero window": (GEMMA3, {"sliding_window": 0}, "sliding_window is 0"),
    "zero cap": (GEMMA3, {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
    "bidirectional": (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "flat gemma rotary": (GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, r"rope_parameters\.rope_theta"),
    "no text config": ({"architectures": ["Gemma3ForConditionalGeneration"]}, {}, "text_config is missing"),
    "rope type": (
        LLAMA,
        {"rope_scaling": {"type": "longrope"}},
        "rope_type is 'longrope'; supported: default",
    ),
    "rope key": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 2, "alpha": 3}},
        r"rope_scaling\.alpha is 3",
    ),
    "rope factor": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor is 0.5"),
    "no rope factor": (LLAMA, {"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
    "dynamic origin": (
        LLAMA,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}},
        "original_max_position_embeddings is 7; supported: None or 4096",
    ),
    "llama3 ramp": (
        LLAMA,
        {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor is 1.0",
    ),
    "two spellings": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        "both rope_scaling and rope_parameters",
    ),
    "rope list": (LLAMA, {"rope_scaling": [1]}, r"rope_scaling is \[1\]; supported: an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_misread_is_refused_by_name(case: str) -> None:
    values, changes, message = REFUSED[case]
    values = {key: value for key, value in {**values, **changes}.items() if value is not ...}
    with pytest.raises(UnsupportedModelError, match=message) as error:
        read_config(values)
    assert str(error.value).startswith("config.json: ")


@pytest.mark.parametrize("values", [{"architectures": ["GPT2LMHeadModel"]}, {"model_type": "gpt2"}, {}])
def test_an_unknown_architecture_names_what_is_supported(values: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"supported architectures: LlamaForCausalLM, Mistral.*Gemma3"
    ):
        read_config(values)


def test_model_type_stands_in_for_absent_architectures() -> None:
    values = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert read_config({**values, "model_type": "llama"}) == read_config(LLAMA)


def test_reading_a_configuration_needs_no_torch() -> None:
    import subprocess
    import sys

    code = f"""
import sys, json
from headrace.models import kv_groups, read_config
kv_groups(read_config(json.loads({json.dumps(LLAMA)!r})))
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
