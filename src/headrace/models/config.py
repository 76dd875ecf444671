"""What a decoder is, in numbers: read once from config.json by `families`, never changed after.

Flows in: the values of a model's config.json. Flows out: a `ModelConfig`, read by `kv_groups`, `loader`
and `decoder`. It knows no family's name and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


class UnsupportedModelError(ValueError):
    """A model says something that cannot be computed here; the text names the field and what is supported."""


def require(condition: bool, field: str, value: object, supported: str) -> None:
    """Refuse `value` of config.json's `field` unless `condition` holds."""
    if not condition:
        raise UnsupportedModelError(f"config.json: {field} is {value!r}; supported: {supported}")


@dataclass(frozen=True, slots=True)
class DefaultRotary:
    """Rotary positions without scaling (RoFormer, arXiv 2104.09864)."""

    theta: float

    def __post_init__(self) -> None:
        require(self.theta > 1, "rope_theta", self.theta, "a number above 1")


@dataclass(frozen=True, slots=True)
class LinearRotary(DefaultRotary):
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        DefaultRotary.__post_init__(self)
        require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")


@dataclass(frozen=True, slots=True)
class DynamicRotary(DefaultRotary):
    """NTK-aware scaling of the base, by how far the length passes `original_max_positions`."""

    factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        DefaultRotary.__post_init__(self)
        require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")


@dataclass(frozen=True, slots=True)
class Llama3Rotary(DefaultRotary):
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        DefaultRotary.__post_init__(self)
        require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")
        require(self.low_freq_factor > 0, "rope low_freq_factor", self.low_freq_factor, "a positive number")
        require(
            self.high_freq_factor > self.low_freq_factor,
            "rope high_freq_factor",
            self.high_freq_factor,
            f"a number above low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True, slots=True)
class YarnRotary(DefaultRotary):
    """A ramp between kept and interpolated frequencies, and scaled scores (YaRN, arXiv 2309.00071).

    beta_fast, beta_slow: rotations over `original_max_positions` at which the ramp begins and ends
    attention_factor:     multiplies cosines and sines, and so q·k by its square
    truncate:             round the ends of the ramp outwards to whole dimensions
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def __post_init__(self) -> None:
        DefaultRotary.__post_init__(self)
        require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")
        require(self.beta_slow > 0, "rope beta_slow", self.beta_slow, "a positive number")
        require(
            self.beta_fast >= self.beta_slow,
            "rope beta_fast",
            self.beta_fast,
            f"a number of at least beta_slow ({self.beta_slow})",
        )
        require(
            self.attention_factor > 0, "rope attention_factor", self.attention_factor, "a positive number"
        )


Rotary = DefaultRotary | LinearRotary | DynamicRotary | Llama3Rotary | YarnRotary


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What differs between the layers of one model.

    window: a query at position p sees keys in (p - window, p]; None sees all of [0, p]
    """

    window: int | None
    rotary: Rotary

    def __post_init__(self) -> None:
        require(
            self.window is None or self.window > 0, "sliding_window", self.window, "a positive number or null"
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that tells one decoder of these families from another.

    layer_kinds:        one for each layer, in order
    norm_offset:        added to every norm weight of the checkpoint (Gemma stores weight - 1)
    qkv_bias, o_bias, mlp_bias: whether those projections have biases
    qk_norm:            an RMS norm over each head of q and k before rotation
    post_norms:         an RMS norm over the output of attention and of the feed-forward, before the residual
    embedding_scale:    multiplies embeddings
    attention_scale:    multiplies q·k
    attention_softcap, logit_softcap: x becomes cap * tanh(x / cap); None leaves x
    max_positions:      the longest sequence that the model's positions are meant for, scaling included
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    layer_kinds: tuple[LayerKind, ...]
    norm_eps: float
    norm_offset: float
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    embedding_scale: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    activation: Activation
    max_positions: int

    def __post_init__(self) -> None:
        for field, value in (
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.ffn_size),
            ("vocab_size", self.vocab_size),
            ("num_hidden_layers", len(self.layer_kinds)),
            ("max_position_embeddings", self.max_positions),
        ):
            require(value > 0, field, value, "a positive integer")
        require(
            self.heads % self.kv_heads == 0,
            "num_key_value_heads",
            self.kv_heads,
            f"a divisor of num_attention_heads ({self.heads})",
        )
        require(
            self.head_dim % 2 == 0 and self.head_dim > 2,
            "head_dim",
            self.head_dim,
            "an even number above 2 (rotation pairs dimensions)",
        )
        require(self.norm_eps > 0, "rms_norm_eps", self.norm_eps, "a positive number")
        for field, cap in (
            ("attn_logit_softcapping", self.attention_softcap),
            ("final_logit_softcapping", self.logit_softcap),
        ):
            require(cap is None or cap > 0, field, cap, "a positive number or null")

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)
