"""What a cluster's file asks of a simulated fleet, and which of its fields mean nothing there.

In: a file, `--set`, and what the command line says, which goes before both. Out: numbers and options that a
fleet is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from headrace.cluster.options import GatewayOptions
    from headrace.config.cluster import ClusterFile

ACT = (
    *("pools", "split_policy", "routing", "cache"),
    *("engine.max_model_len", "engine.max_num_seqs", "engine.max_num_batched_tokens", "engine.max_waiting"),
    *("engine.kv_cache_memory", "engine.block_size"),
    *("autoscale.prefill.min_replicas", "autoscale.decode.min_replicas", "autoscale.both.min_replicas"),
    *("slo.ttft_ms", "slo.tpot_ms"),
    *("qos.policy", "qos.enable_early_rejection", "qos.reject_on_slo_violation", "qos.degrade"),
    *("qos.worker_steps_ahead", "qos.queue_timeout"),
)
"""Fields and sections that make a difference in a simulation. The others are of what is not simulated:
hardware and kernels, transports, several models, urgent and patient requests, operators' metrics."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the file asks for; None where it says nothing. Lengths in tokens."""

    pools: Mapping[str, int]
    """Workers by role."""
    gateway: GatewayOptions
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    max_waiting: int | None
    block_size: int | None
    kv_cache_bytes: int | None
    """Of each worker."""
    reuse_prefix: bool
    without_meaning: tuple[str, ...]
    """Fields that it has, and that mean nothing here."""

    @classmethod
    def of(cls, path: Path | None, overrides: list[str], counts: Mapping[str, int | None]) -> Asked:
        """`counts` are the workers that the command line asks for, by role. Raises ValueError."""
        from headrace.api.options import gateway_options
        from headrace.config.reading import read_cluster
        from headrace.config.sizes import parse_size
        from headrace.sim.fleet import PLANNED

        file = read_cluster(path, overrides)
        pools = {
            role: replicas if (count := counts[role]) is None else count
            for role, replicas in file.replicas().items()
        }
        if not any(pools.values()):
            raise ValueError("there are no workers: ask for some, as in --prefill 8 --decode 8, or --both 8")
        gateway = replace(
            gateway_options(file, path),
            models=(),  # one is simulated, and made requests for
            aliases=(),
            heartbeat_s=PLANNED.heartbeat_s,
            suspect_after_s=PLANNED.suspect_after_s,
            lapse_s=PLANNED.lapse_s,
        )

        def engine(name: str) -> int | None:
            return getattr(file.engine, name) if file.engine.says(name) else None

        memory = file.engine.kv_cache_memory
        return cls(
            pools=pools,
            gateway=gateway,
            max_model_len=engine("max_model_len"),
            max_num_seqs=engine("max_num_seqs"),
            max_num_batched_tokens=engine("max_num_batched_tokens"),
            max_waiting=engine("max_waiting"),
            block_size=engine("block_size"),
            kv_cache_bytes=parse_size(memory) if file.engine.says("kv_cache_memory") else None,
            reuse_prefix=file.cache.reuse_prefix,
            without_meaning=tuple(without_meaning(file)),
        )


def without_meaning(file: ClusterFile) -> Iterator[str]:
    """The fields that the file has and that mean nothing in a simulation, by their paths."""
    for path in _said(file):
        if not any(path == name or path.startswith(f"{name}.") for name in ACT):
            yield path


def _said(section: BaseModel, under: str = "") -> Iterator[str]:
    for name in type(section).model_fields:  # in their order
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _said(value, f"{under}{name}.")
        else:
            yield under + name
