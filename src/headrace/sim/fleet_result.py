"""What came of a planning simulation: each request, each worker, and the figures one asks for.

In: records. Out: percentiles, goodput, hit rate, utilisation. Times in seconds of virtual time, lengths in
tokens. It must not know how the records came about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from headrace.cluster.journey import Journey
from headrace.protocol.messages import Role


@dataclass(frozen=True, slots=True)
class Served:
    """One request, from its arrival to its ending."""

    name: str
    at_s: float
    prompt_tokens: int
    ended: str
    """A finish reason, or the code of what it was refused with."""
    output_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, where it was prefilled or decoded."""
    ttft_s: float = math.inf
    e2e_s: float = math.inf
    home: str = ""
    """The worker that decoded it."""
    prefill: str = ""
    """The worker that prefilled it for that one; empty where nobody else did."""

    @property
    def tpot_s(self) -> float:
        """Mean seconds from one token to the next; 0 for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def complete(self) -> bool:
        return self.ended in ("length", "stop")

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it was answered within both objectives."""
        return self.complete and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What one worker did."""

    role: Role
    busy_s: float
    """In steps."""
    steps: int
    tokens: int
    """Computed: prompts and outputs."""
    sent_bytes: float
    """Of KV blocks, as modelled."""
    preemptions: int
    prefix_queries: int
    prefix_hits: int


@dataclass(frozen=True, slots=True)
class FleetResult:
    """A run over a trace."""

    requests: tuple[Served, ...]
    """In order of arrival."""
    workers: dict[str, WorkerUse]
    duration_s: float
    """From the first arrival to the last ending."""
    trace_hash: str
    cpu_s: float
    """Of this machine, for the simulation itself."""
    journeys: tuple[Journey, ...] = ()
    """Of the requests that were to be explained, as they ended."""

    def between(self, begin_s: float, end_s: float = math.inf) -> FleetResult:
        """The requests that arrived in this time only, as when caches are to be warm. Workers stay whole."""
        chosen = tuple(one for one in self.requests if begin_s <= one.at_s < end_s)
        return replace(self, requests=chosen)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last, and the mean gap beyond: how long load was offered."""
        if len(self.requests) < 2:
            return self.duration_s
        gaps = self.requests[-1].at_s - self.requests[0].at_s
        return gaps * len(self.requests) / (len(self.requests) - 1)

    def goodput(self, ttft_s: float, tpot_s: float) -> float:
        """Requests a second that were answered within both objectives, of those that arrived in `span_s`."""
        met = sum(one.meets(ttft_s, tpot_s) for one in self.requests)
        return met / self.span_s if self.span_s > 0 else 0.0

    def attainment(self, ttft_s: float, tpot_s: float) -> float:
        """The share of all requests that were answered within both objectives."""
        return sum(one.meets(ttft_s, tpot_s) for one in self.requests) / max(1, len(self.requests))

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens of answered requests that some cache spared them."""
        done = [one for one in self.requests if one.complete]
        return sum(one.cached_tokens for one in done) / max(1, sum(one.prompt_tokens for one in done))

    @property
    def offloaded(self) -> float:
        """The share of answered requests that were prefilled for the worker that decoded them."""
        done = [one for one in self.requests if one.complete]
        return sum(bool(one.prefill) for one in done) / max(1, len(done))

    def utilisation(self, role: Role) -> float:
        """The share of their time that workers of a role spend in steps, in the mean."""
        shares = [one.busy_s / self.duration_s for one in self.workers.values() if one.role is role]
        return sum(shares) / len(shares) if shares and self.duration_s > 0 else 0.0

    def quantiles(self, of: Callable[[Served], float], shares: Iterable[float]) -> list[float]:
        """Quantiles over answered requests, each the least value that so many do not exceed; nan of none."""
        values = sorted(of(one) for one in self.requests if one.complete)
        if not values:
            return [math.nan for _ in shares]
        return [values[min(len(values) - 1, math.ceil(share * len(values)) - 1)] for share in shares]
