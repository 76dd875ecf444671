"""What a family module provides: the architectures it serves, its config reader, its weight names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.models.config import ModelConfig
from headrace.models.families.fields import Fields


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Where a checkpoint keeps what, beyond the names that all families share.

    prefixes:  before "embed_tokens", "layers" and "norm", the first that the checkpoint uses
    heads:     the output projection's name under each of the prefixes
    ffn_norm:  the norm before the feed-forward
    attention_post_norm, ffn_post_norm: read where the config has post norms
    foreign:   beginnings of names that belong to other parts of a multimodal checkpoint
    """

    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head.weight",)
    ffn_norm: str = "post_attention_layernorm"
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One family of models.

    architectures: names of `architectures[0]` in config.json that it serves
    model_types:   names of `model_type`, used where `architectures` is absent
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Fields], ModelConfig]
    names: WeightNames = WeightNames()
