"""From a cluster's file to what the gateway is asked to be.

In: a checked `ClusterFile`. Out: `GatewayOptions`, with times in seconds.
"""

from __future__ import annotations

from pathlib import Path

from headrace.cluster.options import (
    AdmissionOptions,
    AliasOptions,
    DegradeStep,
    GatewayOptions,
    ModelOptions,
    QueueOptions,
    RoutingOptions,
    ServiceLevels,
    SplitPolicy,
)
from headrace.config.cluster import ClusterFile


def gateway_options(file: ClusterFile, path: Path | None = None) -> GatewayOptions:
    """What the file, read from `path`, asks of a gateway."""
    split, qos = file.split_policy, file.qos
    smaller = {name: one.smaller or "" for name, one in file.models.items()}
    return GatewayOptions(
        models=tuple(ModelOptions(name=name, smaller=smaller.get(name, "")) for name in file.sources()),
        aliases=tuple(
            AliasOptions(name=name, versions=tuple(one.versions.items()), smaller=smaller[name])
            for name, one in file.models.items()
            if one.versions is not None
        ),
        split=SplitPolicy(
            prompt_length_threshold=split.prompt_length_threshold, prefill_queue_max=split.prefill_queue_max
        ),
        routing=RoutingOptions(
            policy=file.routing.policy,
            policy_directories=_directories(file.routing.policy, path),
            prefix_cache_weight=split.prefix_cache_weight,
            queue_length_weight=split.queue_length_weight,
            decode_load_weight=split.decode_load_weight,
            affinity_weight=split.affinity_weight,
            hotspot_prevention=split.enable_hotspot_prevention,
            min_cache_hit_ratio=file.cache.min_cache_hit_ratio,
        ),
        slo=ServiceLevels(
            ttft_s=file.slo.ttft_ms / 1e3, tpot_s=file.slo.tpot_ms / 1e3, objective=file.slo.objective
        ),
        queue=QueueOptions(steps_ahead=qos.worker_steps_ahead, timeout_s=qos.queue_timeout),
        admission=AdmissionOptions(
            policy=qos.policy,
            early_rejection=qos.enable_early_rejection,
            low_priority_threshold_s=qos.low_priority_threshold_ms / 1e3,
            reject_on_slo_violation=qos.reject_on_slo_violation,
            degrade=tuple(
                DegradeStep(lower=step.lower, to=step.to, above=step.above) for step in qos.degrade
            ),
        ),
    )


def _directories(policy: str, path: Path | None) -> tuple[str, ...]:
    """Where the module of a policy of the user's own is looked for."""
    here = RoutingOptions().policy_directories
    return here if path is None or ":" not in policy else (str(path.parent), *here)
