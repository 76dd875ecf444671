"""A cluster as a YAML file says it: what `headrace serve --config` reads.

In: a file. Out: the values of the command line's options, by their names; what the command line says itself
goes first. Everything is checked before anything starts, and what is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from headrace.config.engine import Dtype, Quantization
from headrace.config.sizes import parse_size


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, content: Any) -> Any:
        """A section without a field says nothing."""
        return {} if content is None else content


class Pool(_Section):
    """Workers of one role."""

    replicas: int = Field(ge=0)


class Pools(_Section):
    prefill: Pool | None = None
    decode: Pool | None = None
    both: Pool | None = None


class SplitPolicySection(_Section):
    """When a prompt is prefilled by another worker than the one that decodes it."""

    prompt_length_threshold: int | None = Field(default=None, ge=0)
    prefill_queue_max: int | None = Field(default=None, ge=1)


class CacheSection(_Section):
    reuse_prefix: bool = True


class EngineSection(_Section):
    """Of every worker. Lengths in tokens; sizes as 512MiB."""

    dtype: Dtype | None = None
    quantization: Quantization | None = None
    threads: int | None = Field(default=None, ge=1)
    """Of all workers together."""
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    max_waiting: int | None = Field(default=None, ge=1)
    kv_cache_memory: str | None = None
    block_size: int | None = Field(default=None, ge=1, le=1024)
    batch_invariant: bool | None = None
    step_timeout: float | None = Field(default=None, ge=1.0)
    """Seconds after which a step is taken for stuck."""

    @field_validator("kv_cache_memory")
    @classmethod
    def _size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text


class ClusterFile(_Section):
    """The whole file."""

    model: str | None = None
    served_model_name: str | None = None
    pools: Pools = Pools()
    split_policy: SplitPolicySection = SplitPolicySection()
    cache: CacheSection = CacheSection()
    engine: EngineSection = EngineSection()

    def as_options(self) -> dict[str, Any]:
        """What the file says, by the names of `headrace serve`'s options."""
        pools = self.pools
        found: dict[str, Any] = {
            "model": self.model,
            "served_model_name": self.served_model_name,
            "prefill": pools.prefill.replicas if pools.prefill is not None else None,
            "decode": pools.decode.replicas if pools.decode is not None else None,
            "both": pools.both.replicas if pools.both is not None else None,
            "no_prefix_caching": not self.cache.reuse_prefix,
            **self.split_policy.model_dump(),
            **self.engine.model_dump(),
        }
        return {name: value for name, value in found.items() if value is not None}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML forbids a key that comes twice; the library takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_cluster(path: Path) -> ClusterFile:
    """Raises OSError, ValueError that names file, place and what is wrong."""
    try:
        content = yaml.load(path.read_text("utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no fields; write for example: pools: {{decode: {{replicas: 2}}}}")
    try:
        return ClusterFile.model_validate(content)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"]))
        what = "is not a known field" if first["type"] == "extra_forbidden" else first["msg"].lower()
        if first["type"] == "value_error":  # our own words
            what = str(first["ctx"]["error"])
        raise ValueError(f"{path}: {where}: {what}") from None
