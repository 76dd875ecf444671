"""A sequence: the tokens of one sample of one request, and how far their computation has come.

There is no "prefill" and no "decode" here. A sequence has tokens; `scheduled` of them have been handed
to the executor and `computed` of them are known to be in the KV cache. Each step moves both towards the
number of tokens there are.

State      | enters it by                          | leaves it by
-----------|---------------------------------------|------------------------------------------------
BLOCKED    | arrives as sample 1.. of its request  | sample 0 has computed the prompt → WAITING
WAITING    | arrives; or is preempted              | admitted → RUNNING; ended → ENDED
RUNNING    | given a row and blocks                | preempted → WAITING; ended → ENDED
ENDED      | finished, cancelled or failed         | never

A sequence that leaves RUNNING while a step that names it is in flight keeps its row and blocks until that
step is committed (`in_flight` falls to 0): only then may anything else write there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headrace.protocol.requests import GenerateRequest, SamplingParams, TokenLogprobs


class State(enum.Enum):
    BLOCKED = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. Ordered by `rank`: urgency first, then arrival."""

    request: GenerateRequest
    index: int
    rank: tuple[int, int, int]
    """(priority, arrival number of the request, sample index); the smallest is served first."""
    seed: int
    root: bytes
    """Where the chain of block hashes starts: model, layout and tenant."""
    stops: frozenset[int]
    """Tokens that end it."""
    limit: int
    """Tokens, prompt included, at which it ends."""

    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    """The prompt and every committed output token."""
    scheduled: int = 0
    computed: int = 0
    pending: int = 0
    """Tokens being sampled by steps in flight: they count as wanted, their values are not known here."""
    in_flight: int = 0
    """Steps submitted and not committed that name this sequence."""

    row: int | None = None
    """The executor's row of state, from admission until blocks are given back."""
    tables: list[list[int]] = field(default_factory=list)
    """Per KV group: entry j is the block of positions j * block_size onwards, -1 behind a window."""
    hashes: list[bytes] = field(default_factory=list)
    """The chained hash of each full block of `tokens`, computed as far as it was needed."""
    published: int = 0
    """Full blocks offered to the prefix cache."""

    cached_tokens: int | None = None
    """Prompt tokens found in the cache when first admitted."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs_done: bool = False
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def wanted(self) -> int:
        """Positions that exist, counting those being sampled right now."""
        return len(self.tokens) + self.pending

    @property
    def reads_cache(self) -> bool:
        """Prompt log-probabilities need every prompt position computed, once."""
        return self.params.prompt_logprobs is None or self.index > 0 or self.prompt_logprobs_done
