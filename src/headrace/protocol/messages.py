"""The messages between a gateway and an engine, one tagged union for each direction.

A worker dials in and says `Hello` (or `StartFailed`); from then on the gateway submits and cancels, and the
worker answers each sequence with outputs, the last of which carries its one ending.
"""

from __future__ import annotations

import msgspec

from headrace.protocol.requests import GenerateRequest, SequenceOutput

PROTOCOL_VERSION = 1


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves and how; fixed for its life. Lengths in tokens, sizes in bytes."""

    model: str
    revision: str
    """Hash of the weights and configuration."""
    numerics: str
    """Instruction set, torch, kernels and dtype: equal ones give equal bits."""
    dtype: str
    batch_invariant: bool
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    block_size: int
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    prefix_caching: bool
    threads: int
    pid: int
    notes: tuple[str, ...] = ()
    """What the engine decided at start-up and why, in words, one decision a line."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One committed step and the state after it, for metrics. Times in seconds."""

    step: int
    tokens: int
    sampled: int
    rows: int
    step_s: float
    kernel_s: float
    running: int
    waiting: int
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    held_tokens: int
    """Positions that held blocks really carry; against held * block_size it is the cache's efficiency."""
    preemptions: int
    """This and the following are totals since the engine's start."""
    prefix_queries: int
    prefix_hits: int
    evictions: int


class SequenceTimes(msgspec.Struct, frozen=True, array_like=True):
    """How long a sequence spent in each phase, in seconds of the engine's clock; None for one not reached.

    Preempted or not: prefill is from the first time it was scheduled to its first token, decode from there to
    its ending.
    """

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A worker's first message."""

    protocol: int
    engine: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The only word of a worker whose engine cannot be built as asked; another attempt would fail too."""

    message: str
    """What was wrong, the limit, and what to do."""


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step brought; one message a step."""

    outputs: list[SequenceOutput]
    stats: StepStats | None = None
    times: list[SequenceTimes] = []
    """One for each ending among the outputs, in order; none from an engine that has failed."""


class Drained(msgspec.Struct, frozen=True, tag=True):
    """Every accepted request has ended; the worker closes after this."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request."""

    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request, or its sample `index`, if it has not ended."""

    request_id: str
    index: int | None = None


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what was accepted, say `Drained`, and exit."""


FromWorker = Hello | StartFailed | Outputs | Drained
FromGateway = Submit | Cancel | Drain
