"""What a gateway is asked to be. Times in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPolicy:
    """When a prompt is prefilled by another worker than the one that decodes it."""

    prompt_length_threshold: int = 256
    """With more uncached prompt tokens than this."""
    prefill_queue_max: int = 32
    """Unless so many requests are at each prefill worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    split: SplitPolicy = SplitPolicy()
    revision: str = ""
    """The model's, where the gateway has its files: workers of another one are refused."""
    heartbeat_s: float = 1.0
    suspect_after_s: float = 3.0
    """A worker that was silent for so long gets nothing new while there is another."""
    lapse_s: float = 10.0
    """One silent for so long is gone, and its requests are replayed."""
    replay_timeout_s: float = 30.0
    """How long a request that lost its worker waits for another."""
    replay_pause_s: float = 0.01
    """Between two replays, so that one worker's death does not become a flood at the others."""
    max_failures: int = 8
    """Attempts at a request that may fail, whatever went wrong."""
    max_deaths: int = 2
    """Workers that may die under one request; it may be what kills them."""
