"""What the gateway tells those who measure.

In: nothing but calls from the gateway, on its event loop. It must not know what becomes of the numbers. Times
are in seconds: what the gateway saw by its own clock, and what the engine says it took by its own; the two
clocks are never subtracted from each other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from headrace.cluster.classes import Refusal
from headrace.cluster.registry import MemberState
from headrace.protocol.messages import ImportSettled, SequenceTimes, StepStats, WorkerInfo
from headrace.protocol.requests import FinishReason, GenerateRequest


@dataclass(frozen=True, slots=True)
class Ending:
    """How one sample of a request ended."""

    reason: FinishReason
    request: GenerateRequest
    index: int
    output_tokens: int
    e2e_s: float
    times: SequenceTimes | None
    """The engine's own; None for what ended without it."""
    tpot_s: float | None
    """By the gateway's clock, from its first token to its last over the tokens after the first; None for
    fewer than two."""


class GatewayObserver:
    """Nothing is done with what is told here; those who measure override what they want to know."""

    def engine_up(self, worker: WorkerInfo) -> None:
        """A worker dialled in; of the same generation, when only its connection was lost."""

    def engine_lost(self, worker_id: str) -> None:
        """The worker is gone; its requests go on elsewhere or end."""

    def worker_became(self, worker: WorkerInfo, state: MemberState) -> None:
        """A worker that is there is in another state."""

    def step(self, worker_id: str, stats: StepStats) -> None:
        """A step was committed, or requests ended without one."""

    def replayed(self, request: GenerateRequest) -> None:
        """A request lost its worker and is to go on at another."""

    def handed_over(self, request: GenerateRequest, settled: ImportSettled) -> None:
        """A transfer of a request's KV blocks has ended, well or not."""

    def queued(self, request: GenerateRequest) -> None:
        """A request begins to wait at the gateway."""

    def unqueued(self, request: GenerateRequest, waited_s: float | None) -> None:
        """A request waits there no more: it was given to a worker after so long, or ended (None)."""

    def accepted(self, request: GenerateRequest) -> None:
        """A request was handed to the engine."""

    def refused(self, request: GenerateRequest, why: Refusal) -> None:
        """A client asked for what the gateway does not accept, or not now; of several requests, the first."""

    def degraded(self, request: GenerateRequest, steps: Collection[str]) -> None:
        """A client's requests were accepted with less than was asked for, as `n=1`; this is the first."""

    def answered(self, request: GenerateRequest, ttft_s: float | None) -> None:
        """The first token of a request came so long after it; None where it ended in an error before one.

        Once for a request, whichever of its samples came first; never for one that was cancelled before.
        """

    def gave_up(self, request: GenerateRequest, after_s: float) -> None:
        """A request was cancelled so long after it came, before its first token."""

    def first_tokens(self, request: GenerateRequest, ttft_s: float, tokens: int, prompt_tokens: int) -> None:
        """A sample's first tokens came so long after its request.

        Prompt tokens are counted with the first sample of a request only.
        """

    def next_tokens(self, request: GenerateRequest, gap_s: float, tokens: int) -> None:
        """So many further tokens of a sample came so long after those before."""

    def ended(self, ending: Ending) -> None:
        """A sample ended."""
