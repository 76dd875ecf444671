"""One choice among workers, kept so that it can be explained afterwards.

In: the candidates' columns as they were, and the terms that a policy made of them. Out: rows for people and
for JSON, made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from headrace.cluster.facts import Column


class Considered(msgspec.Struct, frozen=True):
    """One worker that could have been chosen. Times in seconds."""

    worker: str
    chosen: bool
    score: float
    """The sum of the terms; the lowest wins."""
    terms: dict[str, float]
    cached_tokens: int
    queued_tokens: int
    ttft_s: float
    """Predicted."""
    tpot_s: float
    age_s: float | None
    """Of what the worker said of its load, with its last step; None: nothing yet. While it has nothing to do,
    these numbers stay as they are."""
    heard_s_ago: float
    """Since it said anything, as in a heartbeat."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Columns are of shape [candidates]."""

    at_s: float
    purpose: str
    """`decode` or `prefill`"""
    policy: str
    rule: str
    """Why it was decided like this, in words."""
    workers: tuple[str, ...]
    chosen: int
    scores: Column
    terms: Mapping[str, Column]
    cached_tokens: Column
    queued_tokens: Column
    ttft_s: Column
    tpot_s: Column
    age_s: Column
    heard_s_ago: Column

    @property
    def worker(self) -> str:
        """The chosen one."""
        return self.workers[self.chosen]

    def considered(self) -> list[Considered]:
        """All candidates, the best first."""
        order = sorted(range(len(self.workers)), key=lambda i: (i != self.chosen, float(self.scores[i])))
        return [
            Considered(
                worker=self.workers[i],
                chosen=i == self.chosen,
                score=float(self.scores[i]),
                terms={name: float(column[i]) for name, column in self.terms.items()},
                cached_tokens=int(self.cached_tokens[i]),
                queued_tokens=int(self.queued_tokens[i]),
                ttft_s=float(self.ttft_s[i]),
                tpot_s=float(self.tpot_s[i]),
                age_s=float(self.age_s[i]) if self.age_s[i] < float("inf") else None,
                heard_s_ago=float(self.heard_s_ago[i]),
            )
            for i in order
        ]
