"""A sequence: the tokens of one sample of one request, and how far their computation has come.

There is no "prefill" and no "decode" here. A sequence has tokens; `scheduled` of them have been handed
to the executor and `computed` of them are known to be in the KV cache. Each step moves both towards the
number of tokens there are.

State      | enters it by                          | leaves it by
-----------|---------------------------------------|------------------------------------------------
BLOCKED    | arrives beside a first sample         | the first has computed the prompt → WAITING
WAITING    | arrives; or is preempted              | admitted → RUNNING or IMPORTING; ended → ENDED
IMPORTING  | given blocks to be filled, and no row | filled, and a row is free → RUNNING; not to be
           |                                       | filled, or gives way → WAITING; ended → ENDED
RUNNING    | given a row and blocks                | preempted → WAITING; ended → ENDED
ENDED      | finished, cancelled, failed; or its   | never
           | prompt is held for another engine     |

A sequence that leaves RUNNING while a step that names it is in flight keeps its row and blocks until that
step is committed (`in_flight` falls to 0): only then may anything else write there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headrace.protocol.handoff import BlockSpan, Leg
from headrace.protocol.requests import GenerateRequest, SamplingParams, TokenLogprobs


class State(enum.Enum):
    BLOCKED = enum.auto()
    WAITING = enum.auto()
    IMPORTING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class Handoff:
    """What a sequence owes a handoff, or is owed by one."""

    leg: Leg
    length: int
    """Positions that travel: the tokens known when the leg began."""
    offload_above: int = 0
    """An import of at most so many uncached positions computes them itself."""
    told: int = 0
    """Positions that others were told they may read."""
    spans: list[BlockSpan] = field(default_factory=list)
    """Blocks that a transport may touch: those told of an export, those to be filled of an import."""
    filled: bool = False
    """An import waits for nothing but a row."""

    def blocks(self) -> list[int]:
        return [block for span in self.spans for block in span.blocks]


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
    leads: bool = True
    """The other samples of its request wait for it to compute the prompt."""
    reach: int = -1
    """Positions that are computed at most: all but the last token that it may have, if not given."""
    handoff: Handoff | None = None

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

    queued_tokens: int = 0
    """To be computed when it starts, as far as was known when it began to wait: the router is told."""
    cached_tokens: int | None = None
    """Prompt tokens found in the cache when first admitted."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs_done: bool = False
    answered: bool = False
    """There was an output here."""
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)
        if self.reach < 0:
            self.reach = self.limit - 1

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
