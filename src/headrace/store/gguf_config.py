"""From a GGUF file's metadata to the `config.json` that the model was published with.

In: metadata and the tensor table. Out: the dictionaries for `config.json` and `generation_config.json`, with
the keys that transformers reads. What changes the arithmetic and has no counterpart here is refused by name
rather than dropped. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from .errors import ModelFileError, UnsupportedModelError
from .gguf_file import GGUFFile

ARCHITECTURES: Final = ("gemma3", "llama", "qwen2", "qwen3")
"""Values of `general.architecture` that are read. Mistral files call themselves "llama"."""

_TURN_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>")
"""Tokens that close a turn in chat templates, though files name only one end token."""

_IGNORED: Final = frozenset(
    {
        "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
        "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip
"""Keys that every architecture here reads or may carry without a meaning of their own."""

_OWN: Final = {
    "gemma3": {
        "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
        "final_logit_softcapping", "attn_logit_softcapping",
    },
    "llama": {"attention.sliding_window", "tensor_data_layout"},
    "qwen2": set(),
    "qwen3": set(),
}  # fmt: skip

_HALF: Final = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The few numbers that undoing GGUF's tensor layouts needs."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool


def shape_of(file: GGUFFile) -> ModelShape:
    """Raises `UnsupportedModelError` for an architecture that is not read and `ModelFileError` for missing
    keys."""
    keys = _Keys(file)
    heads = keys.integer("attention.head_count")
    return ModelShape(
        architecture=keys.architecture,
        layers=keys.integer("block_count"),
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        tied="output.weight" not in file.tensors,
    )


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of the model in `file`."""
    keys = _Keys(file)
    keys.refuse_unknown()
    shape = shape_of(file)
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // shape.heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{file.path}: {keys.architecture}.{key} is {keys.integer(key)}, "
                f"only the full head size {head_dim} is read"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    config: dict[str, Any] = {
        "vocab_size": keys.integer("vocab_size", len(tokens)),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, keys, head_dim),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": _dtype(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape != (config["vocab_size"], hidden):
        # Files may pad the table past the vocabulary; the table is what the weights have.
        config["vocab_size"] = embedding.shape[0]
    return _FAMILIES[keys.architecture](config, file, keys)


def generation_config_of(file: GGUFFile) -> dict[str, Any]:
    """The `generation_config.json`: which tokens begin, end and pad a text."""
    metadata = file.metadata
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template", "")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ends += [tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": unique[0] if len(unique) == 1 else unique,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


class _Keys:
    """The metadata keys under the architecture's own prefix."""

    def __init__(self, file: GGUFFile) -> None:
        architecture = file.metadata.get("general.architecture")
        if architecture is None:
            raise ModelFileError(
                f"{file.path} has no general.architecture, so it holds no model that can be read"
            )
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{file.path} holds architecture {architecture!r}; read are {', '.join(ARCHITECTURES)}"
            )
        pieces = file.metadata.get("split.count", 1)
        if pieces != 1:
            raise UnsupportedModelError(
                f"{file.path} is one of {pieces} pieces of a model; join them with llama.cpp's "
                "llama-gguf-split --merge and import the result"
            )
        self.architecture: str = architecture
        self._file = file

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            raise ModelFileError(
                f"{self._file.path}: {self.architecture}.{key} is {value!r}, not a positive integer"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 key as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelFileError(f"{self._file.path}: {self.architecture}.{key} is {value!r}, not a number")
        return float(str(np.float32(value)))

    def refuse_unknown(self) -> None:
        """Experts, clamps, scales and the like change what the model computes: not knowing one is a
        refusal."""
        prefix = self.architecture + "."
        known = _IGNORED | _OWN[self.architecture]
        for key, value in self._file.metadata.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in known and value:
                raise UnsupportedModelError(
                    f"{self._file.path}: metadata key {key} = {value!r} is not understood here"
                )


def _dtype(file: GGUFFile) -> str:
    """The type that the matrices were published in; quantised ones are stored as float32, which loses
    nothing."""
    kinds = {tensor.quantization for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return _HALF.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"


def _rope_scaling(file: GGUFFile, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, keys, head_dim)
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path}: rope scaling {kind!r} is not read; linear, yarn and llama3 are"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
    return scaling


def _llama3_scaling(file: GGUFFile, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rope scaling, of which a GGUF file keeps only the divisor of each frequency.

    The published models differ in `factor` alone, and the largest divisor is that factor. The divisors that
    follow from it must be the file's own, or the file holds some other scaling.
    """
    divisors = file.rows("rope_freqs.weight").view(np.float32).ravel()
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_divisors(keys.number("rope.freq_base", 10_000.0), head_dim, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path}: the factors in rope_freqs.weight are not those of Llama 3.1 or 3.2"
        )
    return scaling


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What each rotary frequency is divided by, `[head_dim / 2]` (Llama 3.1 model card, "rope_type":
    "llama3")."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth), dtype=np.float64)


def _llama(config: dict[str, Any], file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    named = f"{file.metadata.get('general.name', '')} {file.metadata.get('general.basename', '')}".lower()
    biased = "blk.0.attn_q.bias" in file.tensors
    if not biased and (window or "mistral" in named):
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "sliding_window": window or None,
            **config,
        }
    if window:
        raise UnsupportedModelError(
            f"{file.path}: a Llama model with biases and a sliding window is not read"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        **config,
    }


def _qwen2(config: dict[str, Any], file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        **config,
    }


def _qwen3(config: dict[str, Any], file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_sliding_window": False,
        **config,
    }


def _gemma3(config: dict[str, Any], file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    pattern = keys.integer("attention.sliding_window_pattern", 6)
    layers = config["num_hidden_layers"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": keys.integer("attention.sliding_window"),
        # Every sixth layer attends to the whole context (Gemma 3 report, section 2).
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ],
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": _gemma3_query_scalar(config),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        **config,
        "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
    }


def _gemma3_query_scalar(config: dict[str, Any]) -> int:
    """Attention scores are divided by its root. GGUF does not carry it; only the 27B model, known by its
    depth, departs from the head size (Gemma 3 configurations as published)."""
    if config["num_hidden_layers"] == 62:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


_FAMILIES: Final[dict[str, Callable[[dict[str, Any], GGUFFile, _Keys], dict[str, Any]]]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
