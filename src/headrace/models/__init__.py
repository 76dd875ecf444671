"""Decoder-only language models: from a directory in Hugging Face layout to logits.

`config` says what a model is, `families` reads it from config.json, `kv_groups` says how its KV cache is
laid out in pages: these three without torch. `weights` and `loader` bring the tensors in, `decoder` computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.models.config import ModelConfig, UnsupportedModelError
from headrace.models.families import read_config
from headrace.models.kv_groups import KVGroup, kv_groups

if TYPE_CHECKING:
    from headrace.models.decoder import Decoder
    from headrace.models.loader import load_decoder

__all__ = [
    "Decoder",
    "KVGroup",
    "ModelConfig",
    "UnsupportedModelError",
    "kv_groups",
    "load_decoder",
    "read_config",
]


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for, so that reading a configuration does not."""
    if name == "Decoder":
        from headrace.models.decoder import Decoder

        return Decoder
    if name == "load_decoder":
        from headrace.models.loader import load_decoder

        return load_decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
