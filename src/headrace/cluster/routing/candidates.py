"""The workers that could take a request, as columns: one array for each thing that is known of them.

In: members, and how many leading prompt tokens each holds. Out: arrays of shape [workers], all in the same
order, for policies to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.cluster import prediction
from headrace.cluster.classes import Band
from headrace.cluster.facts import Column, Fact
from headrace.cluster.placement import Possible
from headrace.protocol.requests import GenerateRequest

UNTRIED_S = 10.0
"""What an idle worker showed longer ago than this is not held against who comes."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a policy may know of a request. Lengths in tokens."""

    request_id: str
    prompt_tokens: int
    """Prompt, and what was generated before where the request goes on elsewhere."""
    max_tokens: int
    samples: int
    session: str = ""

    @classmethod
    def of(cls, request: GenerateRequest, prompt_tokens: int, samples: int) -> Wish:
        return cls(request.request_id, prompt_tokens, request.sampling.max_tokens, samples, request.session)


class Candidates:
    """`members` in the order of all columns."""

    def __init__(self, possible: Possible, wish: Wish, cached_tokens: Column, now: float) -> None:
        """`cached_tokens`: of the prompt, for each member; `now` on the gateway's clock."""
        facts = self._facts = possible.facts
        self.now = now
        """On the gateway's clock."""
        self.members = possible.members
        self.wish = wish
        self.last: int | None = None
        """The place of the member that the session's last request went to, as the router knows; None: it is
        none of these, or there is no session."""
        self.cached_tokens = cached_tokens
        self.uncached_tokens: Column = np.maximum(wish.prompt_tokens - cached_tokens, 1.0)
        """That a worker would have to compute before the first token; at least one."""
        self.queued_tokens: Column = facts[:, Fact.QUEUED] + facts[:, Fact.UNSEEN]
        """Prompt tokens that are to be computed there first, those on their way to it included."""
        self.ttft_s = prediction.ttft_s(facts, self.queued_tokens + self.uncached_tokens)
        """Predicted time to the first token of this request."""
        self.tpot_s = prediction.tpot_s(facts, wish.prompt_tokens, self.ttft_s, wish.samples)
        """Predicted time for each output token, with what will be decoded there when the prefill ends."""
        self.age_s: Column = now - facts[:, Fact.TOLD_S]
        """How old what a worker said of its load is, which it does with each step; infinite for one that has
        said nothing yet."""
        self.heard_s_ago: Column = now - facts[:, Fact.HEARD_S]
        """How long ago it said anything, as that it is there."""

    def __len__(self) -> int:
        return len(self.members)

    def untried(self, index: int) -> bool:
        """Whether one of them has nothing to do, and has run no step for so long that it may be another
        machine by now, or never was what is taken for granted of it."""
        facts = self._facts[index]
        return bool(facts[Fact.OPEN_SAMPLES] + facts[Fact.EXPORTS] == 0 and self.age_s[index] > UNTRIED_S)

    def computing_s(self, index: int, band: Band) -> tuple[float, float]:
        """What computing the prompt takes at one of them, and what is queued there that a request of this
        class does not overtake."""
        queued = float(self.queued_tokens[index])
        queued -= self.members[index].outstanding.overtaken_by(band, queued)
        own = float(prediction.computing_s(self._facts, self.uncached_tokens)[index])
        both = float(prediction.computing_s(self._facts, queued + self.uncached_tokens)[index])
        return own, both - own

    @property
    def cacheable_tokens(self) -> Column:
        """Of the prompt in its full blocks, but for the last token, which is always computed."""
        block: Column = self._facts[:, Fact.BLOCK]
        return (self.wish.prompt_tokens - 1) // block * block

    @property
    def step_tokens(self) -> Column:
        """That a step there computes at most."""
        return self._facts[:, Fact.BUDGET]

    @property
    def load(self) -> Column:
        """Open samples, and prompts that it prefills for others, against the sequences that run at once."""
        return (self._facts[:, Fact.OPEN_SAMPLES] + self._facts[:, Fact.EXPORTS]) / self._facts[:, Fact.ROWS]

    @property
    def decode_load(self) -> Column:
        """The scarcer of rows and KV blocks, as the share in use; above 1 something waits for rows."""
        return prediction.decode_load(self._facts)

    @property
    def prefill_tokens_per_s(self) -> Column:
        """In full steps, as measured."""
        return prediction.prefill_tokens_per_s(self._facts)

    @property
    def busy(self) -> Column:
        """Share of their time, lately, that they spent in steps."""
        return prediction.busy(self._facts, self.now)
