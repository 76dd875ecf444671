"""What fields say of each other: where they contradict, and where one of them will not act.

In: a file whose every field is sound by itself. Out: sentences. A contradiction is refused, with the reason
and what to do; what merely does not act, or is odd, is told of and let be.
"""

from __future__ import annotations

from typing import Any

from headrace.config.cluster import ROLES, ClusterFile, PoolAutoscale, Section
from headrace.config.engine import EngineOptions
from headrace.config.sizes import parse_size

_MEASURES = ("queue_length", "gpu_utilization", "kv_cache_usage")
_WEIGHTS = ("prefix_cache_weight", "queue_length_weight", "decode_load_weight", "affinity_weight")
_FORESEEN = ("policy", "low_priority_threshold_ms")
_LATE = 0.6
"""A page for so large a share of missed requests comes late."""


def contradictions(file: ClusterFile) -> list[str]:
    """What cannot be meant together; each begins with the field that is wrong."""
    found = [*_models(file), *_engine(file), *_pools(file), *_ladder(file)]
    for role in ROLES:
        if (scaled := getattr(file.autoscale, role)) is not None:
            found += _scaling(file, role, scaled)
    threshold, longest = file.split_policy.prompt_length_threshold, file.engine.max_model_len
    if file.splits and longest is not None and threshold >= longest:
        found.append(
            f"split_policy.prompt_length_threshold: no prompt has more than {threshold} tokens, since "
            f"engine.max_model_len is {longest}, so prefill workers would get nothing; lower it, or leave "
            "out pools.prefill"
        )
    return found


def remarks(file: ClusterFile) -> list[str]:
    """What does not act, or not as one may think, though it may be meant; each begins with its field."""
    split, qos = file.split_policy, file.qos
    found: list[str] = []
    if not file.splits:
        why = "no prefill worker is started, so this acts only for ones that join"
        found += _tell(why, "split_policy", split, "prompt_length_threshold", "prefill_queue_max")
    if file.routing.policy != "cost":
        why = f"routing.policy is {file.routing.policy}, and only cost weighs"
        found += _tell(why, "split_policy", split, *_WEIGHTS, "enable_hotspot_prevention")
        found += _tell(why, "cache", file.cache, "min_cache_hit_ratio")
    elif not file.cache.reuse_prefix:
        why = "cache.reuse_prefix is false, so no worker holds blocks of a prompt that comes"
        found += _tell(why, "split_policy", split, "prefix_cache_weight", "enable_hotspot_prevention")
        found += _tell(why, "cache", file.cache, "min_cache_hit_ratio")
    if file.transfer.connector == "tcp":
        why = "transfer.connector is tcp, over which every block is compared anyway"
        found += _tell(why, "transfer", file.transfer, "check_reads")
    steps_down = [n for n, step in enumerate(qos.degrade) if step.lower == "model"]
    with_smaller = [name for name, one in file.models.items() if one.smaller is not None]
    if steps_down and not with_smaller:
        found.append(
            f"qos.degrade.{steps_down[0]}: no model has a smaller one; name it as in "
            "models: {NAME: {smaller: OTHER}}"
        )
    if not steps_down:
        found += [
            f"models.{name}.smaller: acts only with a step of qos.degrade with lower: model"
            for name in with_smaller
        ]
    if not foresees(file):
        why = "acts only with qos.enable_early_rejection: true, or steps of qos.degrade"
        found += _tell(why, "qos", qos, *_FORESEEN)
    if not qos.enable_early_rejection:
        why = "acts only with qos.enable_early_rejection: true"
        found += _tell(why, "qos", qos, "reject_on_slo_violation")
    elif qos.reject_on_slo_violation and qos.low_priority_threshold_ms > file.slo.ttft_ms:
        found.append(
            f"qos.low_priority_threshold_ms: at {qos.low_priority_threshold_ms:g} ms it lets low-priority "
            f"requests wait for longer than normal ones, which are refused above slo.ttft_ms "
            f"({file.slo.ttft_ms:g} ms); lower it, or raise slo.ttft_ms"
        )
    return found + _objective(file)


def _objective(file: ClusterFile) -> list[str]:
    """The rules for Prometheus page at any objective, but late where little is promised."""
    objective = file.slo.objective
    missed, _ = paging_shares(objective)
    if not file.slo.says("objective") or missed <= _LATE:
        return []
    return [
        f"slo.objective: at {objective:g} alerts page only when more than {missed:.0%} of an hour's requests "
        "miss; promise more of them, with longer limits, to hear of trouble sooner"
    ]


def paging_shares(objective: float) -> tuple[float, float]:
    """Which share of an hour's requests, and of six hours', must miss an SLO for the rules for Prometheus to
    page (docs/metrics.md, "Alert rules")."""
    budget = 1 - objective
    return budget * min(14.4, budget ** (-1 / 2)), budget * min(6.0, budget ** (-1 / 3))


def foresees(file: ClusterFile) -> bool:
    """Whether the gateway looks at what a request would have to wait before it lets it in."""
    return file.qos.enable_early_rejection or bool(file.qos.degrade)


def _tell(why: str, section: str, content: Section, *names: str) -> list[str]:
    """The same of each field that the file has."""
    return [f"{section}.{name}: {why}" for name in names if content.says(name)]


def engine_options(file: ClusterFile, directory: str = "") -> EngineOptions:
    """What the file asks of the engine of a model in `directory`. Raises ValueError."""
    said: dict[str, Any] = file.engine.model_dump(exclude={"step_timeout"}, exclude_none=True)
    said["kv_cache_memory"] = parse_size(file.engine.kv_cache_memory)
    return EngineOptions(directory=directory, served_name="", **said)


def _engine(file: ClusterFile) -> list[str]:
    try:
        engine_options(file)
    except ValueError as error:
        return [f"engine: {error}"]
    return []


def _pools(file: ClusterFile) -> list[str]:
    counts = file.replicas()
    if counts["prefill"] and not (counts["decode"] or counts["both"]):
        return [f"pools.prefill: {counts['prefill']} workers would prefill for nobody; add pools.decode"]
    unsaid = file.pools.prefill is None and file.autoscale.prefill is None
    if counts["decode"] and not counts["both"] and unsaid:
        return [
            f"pools.decode: {counts['decode']} workers would have to prefill everything themselves; add "
            "pools.prefill, or name them pools.both. Where prefill workers join from elsewhere, say so with "
            "pools: {prefill: {replicas: 0}}"
        ]
    return []


def _models(file: ClusterFile) -> list[str]:
    """A name means one thing, and what serves is a model."""
    found = []
    several = {name for name, one in file.models.items() if one.versions is not None}
    for name, one in file.models.items():
        here = f"models.{name}"
        if not name.strip():
            found.append("models: a name is empty; clients could not ask for it")
        if name == file.served_model_name and (one.model or one.versions):
            found.append(f"{here}: served_model_name calls model so; give this one another name")
        found += [
            f"{here}.versions.{version}: it has versions itself; name the models that it has"
            for version in one.versions or ()
            if version in several
        ]
        if one.smaller in several:
            found.append(f"{here}.smaller: {one.smaller} has versions; name one of them")
        if one.smaller is not None and (one.smaller == name or {one.smaller} == set(one.versions or ())):
            found.append(f"{here}.smaller: {one.smaller} is what serves anyway; name another")
    return found


def _ladder(file: ClusterFile) -> list[str]:
    """A step that another has taken already does nothing."""
    found, lowest = [], dict[str, int]()
    steps = [(number, step, step.to) for number, step in enumerate(file.qos.degrade)]
    models = [number for number, step, _ in steps if step.lower == "model"]
    found += [f"qos.degrade.{each}: the model is a smaller one by then; leave it out" for each in models[1:]]
    for number, step, to in steps:
        if to is None:
            continue
        if to >= lowest.get(step.lower, to + 1):
            found.append(
                f"qos.degrade.{number}: {step.lower} is down to {lowest[step.lower]} by then, and {to} "
                "is not below; lower it, or leave the step out"
            )
        lowest[step.lower] = to
    return found


def _scaling(file: ClusterFile, role: str, scaled: PoolAutoscale) -> list[str]:
    here, least, most = f"autoscale.{role}", scaled.min_replicas, scaled.max_replicas
    if least > most:
        return [
            f"{here}.min_replicas: {least} is above max_replicas ({most}); lower it, or raise max_replicas"
        ]
    found = []
    pool = getattr(file.pools, role)
    if pool is not None and not least <= pool.replicas <= most:
        found.append(
            f"pools.{role}.replicas: {pool.replicas} is not within min_replicas ({least}) and max_replicas "
            f"({most}) of {here}; start as many as it may have, or widen these"
        )
    for name in _MEASURES:
        up, down = getattr(scaled.scale_up, name), getattr(scaled.scale_down, name)
        if up is not None and down is not None and down >= up:
            found.append(
                f"{here}.scale_down.{name}: {down:g} is not below scale_up.{name} ({up:g}), so that workers "
                "would come and go in turn; lower it"
            )
    if least < most:
        found += [
            f"{here}.{name}: no condition is given, so that the pool would never {verb}; give one of "
            f"{', '.join(_MEASURES)}, or make min_replicas and max_replicas equal"
            for name, verb in (("scale_up", "grow"), ("scale_down", "shrink"))
            if not getattr(scaled, name).model_dump(exclude_none=True)
        ]
    return found
