"""Shapes of decoder models: what a step has to multiply, read and keep.

In: the fields of a `config.json`. Out: counts of weights, floating-point operations and KV bytes. Dense
decoders with full attention only. Sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder: grouped-query attention, a gated MLP of three matrices, tokens in and logits out."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    weight_bytes_each: float = 2.0
    """Bytes of one weight of a linear layer."""
    kv_bytes_each: float = 2.0
    """Bytes of one element of a key or a value."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"model {self.name}: {name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model {self.name}: {self.heads} heads cannot share {self.kv_heads} kv heads")
        if self.weight_bytes_each <= 0 or self.kv_bytes_each <= 0:
            raise ValueError(f"model {self.name}: a weight and a KV element have more than 0 bytes")

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: query, key, value, output; gate, up, down. Norms are left out."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, which a step reads whether or not they are the embedding's."""
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """That a step reads."""
        return self.layer_weights + self.head_weights

    @property
    def kv_bytes(self) -> float:
        """Bytes of the keys and values of one position, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_each

    @property
    def pair_flops(self) -> float:
        """Operations of attention for one query at one visible position, all layers: 4 for each element of a
        query head, 2 of them for its score and 2 for the weighted sum."""
        return 4.0 * self.layers * self.heads * self.head_dim

    @classmethod
    def from_config(
        cls,
        name: str,
        config: Mapping[str, Any],
        *,
        weight_bytes_each: float = 2.0,
        kv_bytes_each: float = 2.0,
    ) -> ModelShape:
        """The shape of a model by its `config.json`.

        ValueError for a model with sliding windows or experts, which this cost model does not have.
        """
        for key in ("num_local_experts", "num_experts", "n_routed_experts"):
            if config.get(key):
                raise ValueError(f"{name} has experts ({key}); the cost model knows dense decoders only")
        kinds = config.get("layer_types") or ()
        windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
        if any(kind != "full_attention" for kind in kinds) or (windowed and not kinds):
            raise ValueError(f"{name} has sliding windows; the cost model knows full attention only")
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                name=name,
                layers=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                intermediate=int(config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                max_positions=int(config["max_position_embeddings"]),
                weight_bytes_each=weight_bytes_each,
                kv_bytes_each=kv_bytes_each,
            )
        except KeyError as error:
            raise ValueError(f"the configuration of {name} has no field {error.args[0]!r}") from None


MODELS = {
    shape.name: shape
    for shape in (
        # Of Llama 3.1 70B's and 8B's public config.json; Llama 3 differs in max_position_embeddings (8192).
        ModelShape("llama-70b", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
        ModelShape("llama-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        # Of SmolLM2-135M-Instruct's public config.json; its output projection is its embedding.
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192),
    )
}
"""By name, in bfloat16."""


def model(name: str) -> ModelShape:
    """A shape by its name. ValueError names what there is."""
    if name not in MODELS:
        raise ValueError(f"there is no model shape {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]
