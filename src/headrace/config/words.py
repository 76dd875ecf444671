"""A cluster's file in words: what each field makes the cluster do.

In: a checked file. Out: for each section its fields in order, with value, meaning and whether the value is a
default. It must not know the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from headrace.config.cluster import POLICIES, ROLES, ClusterFile, PoolAutoscale
from headrace.config.consistency import foresees, paging_shares

Says = Callable[[Any, ClusterFile], str]
"""What a field's value does, in words."""

_SERVES = {
    "prefill": "prefill long prompts for others",
    "decode": "decode, and prefill what is not offloaded",
    "both": "do everything",
}
_NOT_FORESEEN = "does not act without enable_early_rejection or degrade"
_MEASURED = {
    "queue_length": "requests waiting per replica are {} {:g}",
    "gpu_utilization": "utilisation of the accelerators is {} {:g}%",
    "kv_cache_usage": "the share of KV cache held is {} {:g}%",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One field."""

    field: str
    """Its path."""
    value: Any
    says: str
    default: bool
    """Whether the file leaves it to us."""
    acts: bool = True
    """Whether this version does it; else a later one."""


def in_words(file: ClusterFile) -> dict[str, list[Line]]:
    """Lines by section, the sections in the order of the reference."""
    whole = [_line(file, "", name, _says(file, name)) for name in ("model", "served_model_name")]
    found = {"model": [*whole, *_models(file)], "pools": list(_pools(file))}
    for name in ("split_policy", "routing", "cache", "engine", "transfer", "slo", "qos"):
        section = getattr(file, name)
        paths = [f"{name}.{field}" for field in type(section).model_fields]
        found[name] = [
            _line(section, f"{name}.", path.rpartition(".")[2], _says(file, path)) for path in paths
        ]
    found["autoscale"] = [
        line for role in ROLES if (scaled := getattr(file.autoscale, role)) for line in _scaling(role, scaled)
    ]
    return found


def _line(section: BaseModel, prefix: str, name: str, says: str, *, acts: bool = True) -> Line:
    default = name not in section.model_fields_set
    return Line(prefix + name, section.model_dump()[name], says, default, acts)


def _models(file: ClusterFile) -> Iterator[Line]:
    if not file.models:
        yield Line("models", {}, "no other model is served", True)
    for name, source in file.sources().items():
        if name in file.models:
            yield _line(file.models[name], f"models.{name}.", "model", f"{source} is served as {name}")
        else:
            yield Line(f"models.{name}.model", None, f"{source} is served as {name}", True)
    for name, one in file.models.items():
        if one.versions is not None:
            total = sum(one.versions.values())
            shares = ", ".join(f"{weight / total:.3g} to {each}" for each, weight in one.versions.items())
            says = f"of the requests for {name}, a share of {shares}; a session keeps to one"
            yield _line(one, f"models.{name}.", "versions", says)
        if one.smaller is not None:
            steps = [step for step in file.qos.degrade if step.lower == "model"]
            says = (
                f"serves in place of {name} above {steps[0].above:.0%} of what is allowed"
                if steps
                else "does not act without a step of qos.degrade with lower: model"
            )
            yield _line(one, f"models.{name}.", "smaller", says)


def _pools(file: ClusterFile) -> Iterator[Line]:
    alone = not any(file.replicas().values())
    for role, count in file.replicas().items():
        field, default = f"pools.{role}.replicas", getattr(file.pools, role) is None
        if alone and role == "both":
            yield Line(field, 1, "one worker does everything", default)
            continue
        says = f"{_many(count, 'worker')} to {_SERVES[role]}" if count else "no such worker"
        if default and getattr(file.autoscale, role) is not None:
            yield Line(field, count, f"{says}, from autoscale.{role}.min_replicas", False)
        else:
            yield Line(field, count, says, default)


def _scaling(role: str, scaled: PoolAutoscale) -> Iterator[Line]:
    prefix = f"autoscale.{role}."
    here = {
        "min_replicas": f"at least {_many(scaled.min_replicas, 'worker')}",
        "max_replicas": f"at most {_many(scaled.max_replicas, 'worker')}",
        "window_s": f"a condition must hold for {scaled.window_s:g} s",
    }
    for name, says in here.items():
        yield _line(scaled, prefix, name, says, acts=name == "min_replicas")
    for name, what, side in (
        ("scale_up", "one worker more where", "above"),
        ("scale_down", "one worker fewer where, beside the others,", "below"),
    ):
        section = getattr(scaled, name)
        said = {m: limit for m in _MEASURED if (limit := getattr(section, m)) is not None}
        for measure, limit in said.items():
            beside = what if len(said) > 1 else what.replace(", beside the others,", "")
            says = f"{beside} {_MEASURED[measure].format(side, limit)}"
            yield _line(section, f"{prefix}{name}.", measure, says, acts=False)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _says(file: ClusterFile, path: str) -> str:
    """What a field does, with the value that it has."""
    section, _, name = path.rpartition(".")
    value = getattr(getattr(file, section), name) if section else getattr(file, name)
    return _SENTENCES[path](value, file)


def _weight(of: str) -> Says:
    def says(weight: Any, file: ClusterFile) -> str:
        if file.routing.policy != "cost":
            return f"does not act: {file.routing.policy} does not weigh"
        return f"weight of {of}" if weight else f"{of} does not count"

    return says


def _acts_with_cost(says: str, otherwise: str) -> Says:
    """Words for a field that only the policy `cost` reads; `otherwise` where it is off."""

    def words(value: Any, file: ClusterFile) -> str:
        if file.routing.policy != "cost":
            return f"does not act: {file.routing.policy} does not weigh"
        return says.format(value=value) if value else otherwise

    return words


def _rejects(value: Any, file: ClusterFile) -> str:
    if not file.qos.enable_early_rejection:
        return "does not act without enable_early_rejection"
    slo = f"{file.slo.ttft_ms:g} ms TTFT or {file.slo.tpot_ms:g} ms TPOT"
    if value:
        return f"a normal request is refused when it would miss {slo}"
    return f"a normal request is let in though it would miss {slo}"


def _low_priority(value: Any, file: ClusterFile) -> str:
    if file.qos.enable_early_rejection:
        return f"a low-priority request is refused when its TTFT would be above {value:g} ms"
    return f"a low-priority request is measured by {value:g} ms TTFT" if file.qos.degrade else _NOT_FORESEEN


_SENTENCES: dict[str, Says] = {
    "model": lambda v, f: (
        "is served"
        if v
        else "give one as the argument, or with --set model=NAME" + ", for all but gateway" * bool(f.models)
    ),
    "served_model_name": lambda v, f: (
        "is what clients ask for" if v else "clients ask for the model's own name"
    ),
    "split_policy.prompt_length_threshold": lambda v, f: (
        f"a prompt with more than {_many(v, 'uncached token')} goes to a prefill worker"
    ),
    "split_policy.prefill_queue_max": lambda v, f: (
        f"unless each prefill worker has {_many(v, 'request')}; then it is computed where it is decoded"
    ),
    "split_policy.prefix_cache_weight": _weight("the prompt's blocks that a worker does not hold"),
    "split_policy.queue_length_weight": _weight("what waits at a worker"),
    "split_policy.decode_load_weight": _weight("what a worker decodes"),
    "split_policy.affinity_weight": _weight("leaving the worker of a session's last request"),
    "split_policy.enable_hotspot_prevention": _acts_with_cost(
        "a popular prefix spreads to more workers when its own are busier than others",
        "a popular prefix stays with the workers that hold it, however busy they are",
    ),
    "routing.policy": lambda v, f: f"a request goes {POLICIES.get(v, 'where this class says')}",
    "cache.reuse_prefix": lambda v, f: (
        "prompts share what they begin with" if v else "every prompt is computed from its first token"
    ),
    "cache.min_cache_hit_ratio": _acts_with_cost(
        "a worker that holds less than {value:.0%} of the prompt's blocks is compared by its load alone",
        "every block that a worker holds of the prompt counts",
    ),
    "engine.dtype": lambda v, f: (
        "bfloat16 where the processor computes in it, else float32"
        if v == "auto"
        else "precision of weights and KV cache"
    ),
    "engine.quantization": lambda v, f: (
        "weights as they are" if v == "none" else f"weights of linear layers in {v}"
    ),
    "engine.threads": lambda v, f: (
        f"{_many(v, 'core')}, shared out among the workers"
        if v
        else "all cores, shared out among the workers"
    ),
    "engine.max_model_len": lambda v, f: (
        "prompt and output together, in tokens" if v else "as long as the model and the KV cache allow"
    ),
    "engine.max_num_seqs": lambda v, f: f"{_many(v, 'sequence')} at once in each worker",
    "engine.max_num_batched_tokens": lambda v, f: (
        f"{_many(v, 'token')} in one step; longer prompts in chunks"
    ),
    "engine.max_waiting": lambda v, f: f"{_many(v, 'sequence')} may wait at a worker; more get 429",
    "engine.kv_cache_memory": lambda v, f: "for the KV cache of each worker",
    "engine.block_size": lambda v, f: f"{_many(v, 'token')} in a KV block",
    "engine.batch_invariant": lambda v, f: (
        "the same bits of output whatever else runs"
        if v
        else "what else runs may change the last bits of a logit"
    ),
    "engine.step_timeout": lambda v, f: f"an engine that takes {v:g} s for a step is stuck, and is replaced",
    "transfer.connector": lambda v, f: {
        "auto": "KV blocks move over NIXL between workers of one machine that both have it, else over TCP",
        "nixl": "KV blocks move over NIXL between workers that reach each other so, else over TCP; a worker "
        "that cannot have it does not start",
        "tcp": "KV blocks move over TCP",
    }[v],
    "transfer.check_reads": lambda v, f: (
        "every block that came is compared with its source's checksum"
        if v
        else "blocks that came over TCP are compared with their source's checksums, over NIXL not"
    ),
    "slo.ttft_ms": lambda v, f: f"the first token within {v:g} ms",
    "slo.tpot_ms": lambda v, f: f"each further token within {v:g} ms",
    "slo.objective": lambda v, f: (
        f"for {v:.4g} of the requests of each class; metrics go by it, and alerts, which page when "
        "{:.2g}% of an hour's requests miss, or {:.2g}% of six hours'".format(
            *(100 * share for share in paging_shares(v))
        )
    ),
    "qos.policy": lambda v, f: (
        _NOT_FORESEEN
        if not foresees(f)
        else "TTFT and TPOT are foreseen by models fitted to each worker"
        if v == "predictive"
        else "TTFT is foreseen as queue length times average time"
    ),
    "qos.enable_early_rejection": lambda v, f: (
        "a request may be refused for what it would have to wait"
        if v
        else "refused only where queues are full"
    ),
    "qos.low_priority_threshold_ms": _low_priority,
    "qos.reject_on_slo_violation": _rejects,
    "qos.worker_steps_ahead": lambda v, f: (
        f"requests wait at the gateway, by class and fair between tenants, while each worker has prompts for "
        f"{v:g} steps"
    ),
    "qos.queue_timeout": lambda v, f: f"a request that no worker was free for within {v:g} s gets 429",
    "qos.degrade": lambda v, f: (
        "; ".join(
            f"{step.lower} down to {step.to or 'the smaller one'} above {step.above:.0%} of what is allowed"
            + ("" if step.lower == "model" else ", waits for prefill workers aside")
            for step in v
        )
        or "nothing is taken from a request that would wait too long"
    ),
}
