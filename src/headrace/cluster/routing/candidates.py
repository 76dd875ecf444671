"""The workers that could take a request, as columns: one array for each thing that is known of them.

In: members, and how many leading prompt tokens each holds. Out: arrays of shape [workers], all in the same
order. Policies read these; what is derived from others is computed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from headrace.cluster.registry import Member
from headrace.protocol.requests import GenerateRequest

Column = NDArray[np.float64]
"""[workers]"""


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

    def __init__(self, members: Sequence[Member], wish: Wish, cached_tokens: Column, now: float) -> None:
        """`cached_tokens`: of the prompt, for each member; `now` on the gateway's clock."""
        self.members = members
        self.wish = wish
        self.cached_tokens = cached_tokens
        self._now = now

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def uncached_tokens(self) -> Column:
        """That a worker would have to compute before the first token; at least one."""
        return np.maximum(self.wish.prompt_tokens - self.cached_tokens, 1.0)

    @cached_property
    def queued_tokens(self) -> Column:
        """Prompt tokens that are to be computed there first, those on their way to it included."""
        return self._column([member.queued_tokens for member in self.members])

    @cached_property
    def step_tokens(self) -> Column:
        """That a step there computes at most."""
        return self._column([member.info.engine.max_num_batched_tokens for member in self.members])

    @cached_property
    def load(self) -> Column:
        """Open samples against those that run at once."""
        return self._column([member.load for member in self.members])

    @cached_property
    def decode_load(self) -> Column:
        """The scarcer of rows and KV blocks, as the share in use; above 1 something waits for rows."""
        return self._column([member.decode_load for member in self.members])

    @cached_property
    def prefill_tokens_per_s(self) -> Column:
        """In full steps, as measured."""
        return self._column([member.pace.prefill_tokens_per_s for member in self.members])

    @cached_property
    def busy(self) -> Column:
        """Share of their time, lately, that they spent in steps."""
        return self._column([member.pace.busy(self._now) for member in self.members])

    @cached_property
    def ttft_s(self) -> Column:
        """Predicted time to the first token of this request."""
        return self._column(
            [
                member.pace.ttft_s(queued + uncached, member.open_samples)
                for member, queued, uncached in zip(
                    self.members, self.queued_tokens.tolist(), self.uncached_tokens.tolist(), strict=True
                )
            ]
        )

    @cached_property
    def tpot_s(self) -> Column:
        """Predicted time for each output token, with what will be decoded there when the prefill ends."""
        return self._column(
            [
                member.pace.tpot_s(self.wish.prompt_tokens, ttft_s, member.open_samples)
                for member, ttft_s in zip(self.members, self.ttft_s.tolist(), strict=True)
            ]
        )

    @cached_property
    def age_s(self) -> Column:
        """How old what a worker said of itself is; infinite for one that has said nothing yet."""
        now = self._now
        return self._column([now - member.told_s for member in self.members])

    @staticmethod
    def _column(values: list[float] | list[int]) -> Column:
        return np.array(values, dtype=np.float64)
