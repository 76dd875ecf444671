"""What the gateway tells those who measure.

In: nothing but calls from the gateway, on its event loop. It must not know what becomes of the numbers. Times
are in seconds: what the gateway saw by its own clock, and what the engine says it took by its own; the two
clocks are never subtracted from each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.protocol.messages import ImportSettled, SequenceTimes, StepStats, WorkerInfo
from headrace.protocol.requests import ErrorCode, FinishReason, GenerateRequest


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


class GatewayObserver:
    """Nothing is done with what is told here; those who measure override what they want to know."""

    def engine_up(self, worker: WorkerInfo) -> None:
        """A worker dialled in; of the same generation, when only its connection was lost."""

    def engine_lost(self, worker_id: str) -> None:
        """The worker is gone; its requests go on elsewhere or end."""

    def step(self, worker_id: str, stats: StepStats) -> None:
        """A step was committed, or requests ended without one."""

    def replayed(self) -> None:
        """A request lost its worker and is to go on at another."""

    def handed_over(self, settled: ImportSettled) -> None:
        """A transfer of KV blocks has ended, well or not."""

    def accepted(self, request: GenerateRequest) -> None:
        """A request was handed to the engine."""

    def refused(self, code: ErrorCode) -> None:
        """A client asked for what the gateway does not accept, or not now."""

    def first_tokens(self, ttft_s: float, tokens: int, prompt_tokens: int) -> None:
        """A sample's first tokens came so long after its request.

        Prompt tokens are counted with the first sample of a request only.
        """

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        """So many further tokens of a sample came so long after those before."""

    def ended(self, ending: Ending) -> None:
        """A sample ended."""
