"""The supported families, and the one door to them: config.json in, `ModelConfig` and weight names out.

A family is a small module that holds what differs: defaults, fields and weight names. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from headrace.models.config import ModelConfig, UnsupportedModelError
from headrace.models.families import gemma3, llama, qwen2, qwen3
from headrace.models.families.family import Family, WeightNames
from headrace.models.families.fields import Fields

__all__ = ["FAMILIES", "Family", "WeightNames", "find_family", "read_config"]

FAMILIES: Final[tuple[Family, ...]] = (
    llama.LLAMA,
    llama.MISTRAL,
    qwen2.QWEN2,
    qwen3.QWEN3,
    gemma3.GEMMA3_TEXT,
    gemma3.GEMMA3,
)


def find_family(values: Mapping[str, object]) -> Family:
    """The family of a config.json, by `architectures[0]`, or by `model_type` where that is absent."""
    architectures = values.get("architectures")
    if isinstance(architectures, list) and architectures:
        for family in FAMILIES:
            if architectures[0] in family.architectures:
                return family
        found = f"architectures is {architectures!r}"
    else:
        for family in FAMILIES:
            if values.get("model_type") in family.model_types:
                return family
        found = f"architectures is missing and model_type is {values.get('model_type')!r}"
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(f"config.json: {found}; supported architectures: {supported}")


def read_config(values: Mapping[str, object]) -> ModelConfig:
    """The contents of config.json → ModelConfig. Raises UnsupportedModelError."""
    return find_family(values).read(Fields(values))
