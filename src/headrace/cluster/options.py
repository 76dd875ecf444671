"""What a gateway is asked to be. Times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPolicy:
    """When a prompt is prefilled by another worker than the one that decodes it."""

    prompt_length_threshold: int = 256
    """With more uncached prompt tokens than this."""
    prefill_queue_max: int = 32
    """Unless so many requests are at each prefill worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """Which worker a request goes to. Weights are plain numbers; a term of weight 0 does not count."""

    policy: str = "cost"
    """Name of a built-in policy, or `module:Class` of one's own."""
    policy_directories: tuple[str, ...] = (".",)
    """Where that module is looked for when it is not on Python's path."""
    prefix_cache_weight: float = 1.0
    """Of the prompt's blocks that a worker would have to compute."""
    queue_length_weight: float = 1.0
    """Of the prompt tokens that wait there."""
    decode_load_weight: float = 0.5
    """Of what it decodes already."""
    affinity_weight: float = 0.05
    """Of all workers but the one that the session's last request went to: so much of a full step it may be
    behind another."""
    hotspot_prevention: bool = True
    """Whether a popular prefix spreads to more workers when those that hold it are busier than others."""
    min_cache_hit_ratio: float = 0.0
    """A worker that holds a smaller share of the prompt's blocks is compared by its load alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevels:
    """What a request may expect (SLO)."""

    ttft_s: float = 0.2
    tpot_s: float = 0.05
    objective: float = 0.95
    """The share of requests that should get it; what is missing to 1 is the error budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DegradeStep:
    """Something that is taken from a request when it would have to wait too long."""

    lower: Literal["n", "max_tokens", "model"]
    """A number that it asks for; or its model, to the smaller one that is configured for it."""
    to: int | None = None
    """What is left of a number."""
    above: float = 0.8
    """When its predicted TTFT or TPOT is above this share of what it may expect; for `n` and `max_tokens`
    waits for prefill workers aside, which these cannot shorten."""

    def in_words(self, smaller: str) -> str:
        """What a client is told of it; `smaller` is the model that serves instead."""
        return f"{self.lower}={smaller if self.lower == 'model' else self.to}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOptions:
    """Whether a request may come in, by what it would have to wait."""

    policy: str = "predictive"
    """`predictive`, or `naive`: queue length times average time."""
    early_rejection: bool = False
    """Whether anything is refused before the queues are full."""
    low_priority_threshold_s: float = 0.5
    """A low-priority request is refused when its predicted TTFT is above this."""
    reject_on_slo_violation: bool = False
    """Whether a normal one is refused when its predicted TTFT or TPOT is above the SLO."""
    degrade: tuple[DegradeStep, ...] = ()
    """What is taken from a request before it is refused, step by step while it would wait too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """The gateway's queue, in which requests wait whose workers have enough to do."""

    steps_ahead: float = 2.0
    """A worker has enough when the prompt tokens that wait there fill so many of its steps: one that it
    computes while it is told of, and one that follows. Normal requests may be a step further ahead, those of
    high priority two."""
    timeout_s: float = 300.0
    """How long a request waits that no worker has had yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """A model whose workers may join. They form a group: a request stays within it to its end."""

    name: str
    """What clients ask for, and what its workers say that they serve."""
    revision: str = ""
    """Hash of its weights and configuration: workers of another one are refused. Empty: the first one's."""
    smaller: str = ""
    """The model that serves in its place when it is under pressure; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasOptions:
    """A name for several models, versions of what a client asks for."""

    name: str
    versions: tuple[tuple[str, float], ...]
    """Models and their weights, of which at least one is above 0."""
    smaller: str = ""
    """As of a model; goes before what its versions say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    models: tuple[ModelOptions, ...] = ()
    """Workers of others are refused. Without any, whatever models there are are those of the workers."""
    aliases: tuple[AliasOptions, ...] = ()
    split: SplitPolicy = SplitPolicy()
    routing: RoutingOptions = RoutingOptions()
    slo: ServiceLevels = ServiceLevels()
    admission: AdmissionOptions = AdmissionOptions()
    queue: QueueOptions = QueueOptions()
    cache_key: bytes = field(default=b"", repr=False)
    """Of the hashes that name KV blocks, where the gateway may compute them; a secret."""
    heartbeat_s: float = 1.0
    suspect_after_s: float = 3.0
    """A worker that was silent for so long gets nothing new while there is another."""
    lapse_s: float = 10.0
    """One silent for so long is gone, and its requests are replayed."""
    replay_timeout_s: float = 30.0
    """How long a request that lost its worker waits for another."""
    max_failures: int = 8
    """Attempts at a request that may fail, whatever went wrong."""
    max_deaths: int = 2
    """Workers that may die under one request; it may be what kills them."""
