"""What one engine's scheduler is held to, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of one engine. All lengths are in tokens."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 4096
    """Sequences that may wait while `max_num_seqs` run."""
    reuse_prefix: bool = True
    steps_in_flight: int = 1
    max_leased_blocks: int | None = None
    """Blocks that prompts held for others may take; None: half of the pool. A larger prompt goes alone."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "vocab_size", "max_num_seqs", "max_waiting", "steps_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_leased_blocks is not None and self.max_leased_blocks < 0:
            raise ValueError(f"max_leased_blocks must be at least 0, got {self.max_leased_blocks}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can advance in every step"
            )


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Tokens found there."""
