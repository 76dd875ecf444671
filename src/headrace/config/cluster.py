"""A cluster as a YAML file says it: every section and field, its limits, its default.

In: what `reading` found in the file. Out: a `ClusterFile`, and the values of command-line options by their
names, for those fields that have one. Defaults are those of the options that fields become; a test holds them
together. It must not know who acts on a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headrace.config.engine import (
    DEFAULT_STEP_TIMEOUT_S,
    MOST_REQUESTS,
    MOST_TOKENS,
    Connector,
    Dtype,
    EngineOptions,
    Quantization,
)
from headrace.config.sizes import format_size, parse_size

POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "cost": "to the lowest weighted sum of uncached blocks, queue and decode load",
        "latency": "to the lowest predicted TTFT, and TPOT",
        "capacity": "to the worker whose queue is over soonest, by its measured speed",
        "random": "anywhere, by chance",
        "round_robin": "to each worker in turn",
        "least_loaded": "to the worker with the least to do",
        "power_of_two": "to the less loaded of two drawn by chance",
        "prefix": "to the worker that holds most of the prompt",
        "session": "to one worker for each session, by a hash of both; without a session to the least loaded",
    }
)
"""The built-in routing policies, and where each sends a request."""

_ENGINE = EngineOptions(directory="", served_name="")


def _in_words(size: Any) -> Any:
    """A plain number of bytes is a size too."""
    return str(size) if isinstance(size, int) and not isinstance(size, bool) else size


def _check_size(text: str) -> str:
    parse_size(text)
    return text


def _check_policy(name: str) -> str:
    module, colon, of_it = name.partition(":")
    if name in POLICIES or (colon and module.replace(".", "").isidentifier() and of_it.isidentifier()):
        return name
    raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}, and module:Class")


def _unit(unit: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"unit": unit}, **limits)


MOST_WORKERS = 10_000
MOST_WEIGHT = 1_000_000
DAY_S = 86_400
"""Limits against slips of the pen, as those of `config.engine`; sums within them do not overflow."""

Weight = Annotated[float, Field(ge=0, le=MOST_WEIGHT)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, _unit("%", ge=0, le=100)]
QueueLength = Annotated[float, _unit("requests per replica", ge=0, le=MOST_REQUESTS)]
Milliseconds = Annotated[float, _unit("ms", gt=0, le=1000 * DAY_S)]
Size = Annotated[
    str,
    BeforeValidator(_in_words),
    AfterValidator(_check_size),
    Field(json_schema_extra={"unit": "bytes", "type": ["string", "integer"]}),
]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, content: Any) -> Any:
        """A section without a field says nothing."""
        return {} if content is None else content

    def says(self, field: str) -> bool:
        """Whether the file has this field."""
        return field in self.model_fields_set


class Pool(Section):
    """Workers of one role."""

    replicas: Annotated[int, _unit("workers", ge=0, le=MOST_WORKERS)]
    """Workers that `serve` starts."""


class Pools(Section):
    """The workers, by role. A pool that is not named has `min_replicas` of `autoscale`, or none; where all
    are empty, one worker does everything."""

    prefill: Pool | None = None
    """Workers that prefill long prompts for others."""
    decode: Pool | None = None
    """Workers that decode; prompts that are not offloaded they prefill too."""
    both: Pool | None = None
    """Workers that do everything; without a prefill pool they prefill for workers that decode."""


class SplitPolicy(Section):
    """When a prompt is prefilled by another worker than the one that decodes it, and the router's weights."""

    prompt_length_threshold: Annotated[int, _unit("tokens", ge=0, le=MOST_TOKENS)] = 256
    """A prompt with more uncached tokens than this goes to a prefill worker."""
    prefill_queue_max: Annotated[int, _unit("requests per prefill worker", ge=1, le=MOST_REQUESTS)] = 32
    """Unless each prefill worker has so many already; then the prompt is computed where it is decoded."""
    prefix_cache_weight: Weight = 1.0
    """Weight, in the policy `cost`, of the prompt's blocks that a worker does not hold; 0 leaves it out."""
    queue_length_weight: Weight = 1.0
    """Weight, in the policy `cost`, of what waits at a worker."""
    decode_load_weight: Weight = 0.5
    """Weight, in the policy `cost`, of what a worker decodes."""
    affinity_weight: Weight = 0.05
    """Weight, in the policy `cost`, of not being the worker that the session's last request went to; 0 leaves
    it out."""
    enable_hotspot_prevention: bool = True
    """Whether, in the policy `cost`, a popular prefix spreads when the workers that hold it are busier than
    others."""


class Routing(Section):
    """Which worker a request goes to."""

    policy: Annotated[str, AfterValidator(_check_policy)] = "cost"
    """`cost`, `latency`, `capacity`, `random`, `round_robin`, `least_loaded`, `power_of_two`, `prefix`,
    `session`, or a class of one's own as `module:Class`, found on Python's path, beside this file, or in the
    working directory."""


class Cache(Section):
    """The prefix cache."""

    reuse_prefix: bool = True
    """Whether prompts share what they begin with; without, every prompt is computed from its first token."""
    min_cache_hit_ratio: Share = 0.0
    """In the policy `cost`, a worker that holds a smaller share of the prompt's blocks than this is compared
    by its load alone."""


class Engine(Section):
    """Every worker's engine."""

    dtype: Dtype = _ENGINE.dtype
    """Precision of weights and KV cache; `auto` is bfloat16 where the processor computes in it."""
    quantization: Quantization = _ENGINE.quantization
    """Of the weights; `int8` reads half of bfloat16's bytes, and loses a little."""
    threads: Annotated[int, _unit("cores", ge=1, le=MOST_WORKERS)] | None = None
    """Of all workers together; without, every core that the process may use."""
    max_model_len: Annotated[int, _unit("tokens", ge=2, le=MOST_TOKENS)] | None = None
    """Longest prompt and output together; without, what the model and the KV cache allow."""
    max_num_seqs: Annotated[int, _unit("sequences", ge=1, le=MOST_REQUESTS)] = _ENGINE.max_num_seqs
    """Sequences that run at once, in each worker."""
    max_num_batched_tokens: Annotated[int, _unit("tokens", ge=1, le=MOST_TOKENS)] = (
        _ENGINE.max_num_batched_tokens
    )
    """Tokens computed in one step; longer prompts are prefilled in chunks. At least `max_num_seqs`."""
    max_waiting: Annotated[int, _unit("sequences", ge=1, le=MOST_REQUESTS)] = _ENGINE.max_waiting
    """Sequences that may wait at a worker; more are refused with 429."""
    kv_cache_memory: Size = format_size(_ENGINE.kv_cache_memory).replace(" ", "")
    """KV cache of each worker, as in 512MiB or 2GiB, or a number of bytes."""
    block_size: Annotated[int, _unit("tokens", ge=1, le=1024)] = _ENGINE.block_size
    """Positions of one KV block."""
    batch_invariant: bool = _ENGINE.batch_invariant
    """The same bits of output whatever else runs."""
    step_timeout: Annotated[float, _unit("s", ge=1, le=DAY_S)] = DEFAULT_STEP_TIMEOUT_S
    """An engine that takes longer for a step is stuck, and is replaced."""


class Transfer(Section):
    """How KV blocks move between workers."""

    connector: Connector = "auto"
    """`auto` is NIXL between workers of one machine that both have it, else TCP; with `nixl` a worker has
    NIXL or does not start, and listens for it on the network too; with `tcp` none has it."""
    check_reads: bool = False
    """Whether blocks that came over NIXL are compared with checksums of the source's; over TCP all are."""


class ScaleUp(Section):
    """A replica is added when any of these holds."""

    queue_length: QueueLength | None = None
    """More requests wait than this."""
    gpu_utilization: Percent | None = None
    """The accelerators are busier than this."""
    kv_cache_usage: Percent | None = None
    """More of the KV cache is held than this."""


class ScaleDown(Section):
    """A replica is removed when all of these hold."""

    queue_length: QueueLength | None = None
    """Fewer requests wait than this."""
    gpu_utilization: Percent | None = None
    """The accelerators are less busy than this."""
    kv_cache_usage: Percent | None = None
    """Less of the KV cache is held than this."""


class PoolAutoscale(Section):
    """Limits and conditions of one pool."""

    min_replicas: Annotated[int, _unit("workers", ge=0, le=MOST_WORKERS)]
    """The fewest; so many are started where `pools` does not say."""
    max_replicas: Annotated[int, _unit("workers", ge=1, le=MOST_WORKERS)]
    """The most."""
    window_s: Annotated[float, _unit("s", gt=0, le=DAY_S)] = 30.0
    """How long a condition must hold."""
    scale_up: ScaleUp = ScaleUp()
    """When a replica is added; without a condition, never."""
    scale_down: ScaleDown = ScaleDown()
    """When a replica is removed; without a condition, never."""


class Autoscale(Section):
    """How pools grow and shrink. Checked by this version; only `min_replicas` acts in it."""

    prefill: PoolAutoscale | None = None
    """Of the prefill pool."""
    decode: PoolAutoscale | None = None
    """Of the decode pool."""
    both: PoolAutoscale | None = None
    """Of the pool whose workers do everything."""


class Slo(Section):
    """What a request may expect (SLO)."""

    ttft_ms: Milliseconds = 200.0
    """Time to the first token."""
    tpot_ms: Milliseconds = 50.0
    """Time per output token after the first."""
    objective: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """The share of requests that should get this, of each class; attainment and burn rate are measured by
    it."""


class DegradeStep(Section):
    """What is taken from a request that would have to wait too long."""

    lower: Literal["n", "max_tokens", "model"]
    """The field of the request that is lowered, `model` to the `smaller` one that `models` gives it; the
    answer says so."""
    to: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """To so many at most; not with `lower: model`."""
    above: Annotated[float, Field(gt=0, le=MOST_WEIGHT)] = 0.8
    """When its predicted TTFT or TPOT is above this share of what it may expect; for `n` and `max_tokens`
    waits for prefill workers aside, which these cannot shorten."""

    @model_validator(mode="after")
    def _a_number_is_lowered_to_one(self) -> DegradeStep:
        if self.lower == "model" and self.to is not None:
            raise ValueError("to: a model is lowered to its smaller one, which models names; leave it out")
        if self.lower != "model" and self.to is None:
            raise ValueError(f"to: is missing; say how much is left of {self.lower}")
        return self


class Qos(Section):
    """Whether a request may come in, by what it would have to wait."""

    policy: Literal["predictive", "naive"] = "predictive"
    """How TTFT and TPOT are foreseen: `predictive`, by models fitted to each worker, or `naive`, queue length
    times average time."""
    enable_early_rejection: bool = False
    """Whether a request is refused for what it would have to wait; without, only when queues are full."""
    low_priority_threshold_ms: Milliseconds = 500.0
    """A low-priority request is refused when its predicted TTFT is above this."""
    reject_on_slo_violation: bool = False
    """Whether a normal one is refused when its predicted TTFT or TPOT is above the SLO."""
    degrade: list[DegradeStep] = []
    """What is taken from a normal or low-priority request before it is refused, step by step while it would
    wait too long."""
    worker_steps_ahead: Annotated[float, _unit("steps", gt=0, le=MOST_REQUESTS)] = 2.0
    """A request waits at the gateway while the prompt tokens that wait at each worker fill so many of its
    steps; a normal one may be a step further ahead, one of high priority two."""
    queue_timeout: Annotated[float, _unit("s", gt=0, le=DAY_S)] = 300.0
    """How long a request waits for its first worker before it is ended with 429."""


class Model(Section):
    """A name that clients may ask for: a model, or several versions of one."""

    model: str | None = None
    """A name, a directory, a GGUF file, or a hub id; without, what it is called here."""
    versions: dict[str, Weight] | None = None
    """Instead of a model: the weight of each version, by the name of a model, 0 to 1000000 and not all 0. One
    that `models` does not name is served too, by its own name."""
    smaller: str | None = None
    """The model that serves in its place under pressure, at a step `lower: model` of `qos.degrade`; named as
    versions are."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Model:
        if self.versions is None:
            return self
        if self.model is not None:
            raise ValueError("it has versions, and is no model itself; leave out model or versions")
        if not any(self.versions.values()):
            raise ValueError("versions: none has a weight above 0; give at least one")
        return self


class ClusterFile(Section):
    """A Headrace cluster."""

    model: str | None = None
    """A name, a directory, a GGUF file, or a hub id; without, the command line gives it."""
    served_model_name: str | None = None
    """Name that clients ask for; without, the model's own."""
    models: dict[str, Model] = {}
    """Models that are served beside `model`, by the names that clients ask for. `gateway` serves all of them;
    `serve` has workers of `model`, and workers of the others join it."""
    pools: Pools = Pools()
    split_policy: SplitPolicy = SplitPolicy()
    routing: Routing = Routing()
    cache: Cache = Cache()
    engine: Engine = Engine()
    transfer: Transfer = Transfer()
    autoscale: Autoscale = Autoscale()
    slo: Slo = Slo()
    qos: Qos = Qos()

    def sources(self) -> dict[str, str]:
        """What each model of `models` is read from, those included that only versions and smaller name."""
        found = {name: one.model or name for name, one in self.models.items() if one.versions is None}
        for one in self.models.values():
            named = [*(one.versions or ()), *([one.smaller] if one.smaller is not None else ())]
            found |= {name: name for name in named if name not in self.models}
        return found

    def replicas(self) -> dict[str, int]:
        """Workers of each role that are to be started; all 0 is one that does everything."""
        found = {}
        for role in ROLES:
            pool, scaled = getattr(self.pools, role), getattr(self.autoscale, role)
            found[role] = pool.replicas if pool is not None else scaled.min_replicas if scaled else 0
        return found

    @property
    def splits(self) -> bool:
        """Whether some workers that are started prefill for others."""
        counts = self.replicas()
        return counts["prefill"] > 0 or (counts["decode"] > 0 and counts["both"] > 0)

    def as_options(self) -> dict[str, Any]:
        """What the file says of that which has an option of `headrace serve`, by the options' names."""
        found: dict[str, Any] = {"model": self.model, "served_model_name": self.served_model_name}
        named = self.pools.model_fields_set | self.autoscale.model_fields_set
        found |= {role: count for role, count in self.replicas().items() if role in named}
        if self.cache.says("reuse_prefix"):
            found["no_prefix_caching"] = not self.cache.reuse_prefix
        split = {"prompt_length_threshold", "prefill_queue_max"}
        found |= self.split_policy.model_dump(include=split, exclude_unset=True)
        found |= self.engine.model_dump(exclude_unset=True)
        found |= self.transfer.model_dump(exclude_unset=True)
        return {name: value for name, value in found.items() if value is not None}


ROLES = tuple(Pools.model_fields)
"""The pools there are; each is a role of workers, and may be scaled."""
