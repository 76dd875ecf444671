"""The messages between a worker's supervisor and its engine process, one tagged union for each direction.

The engine dials its supervisor and says `EngineReady` (or `StartFailed`). It answers between two steps, never
within one.
"""

from __future__ import annotations

import msgspec

from headrace.protocol.handoff import HandoffEvent
from headrace.protocol.messages import (
    Cancel,
    EngineInfo,
    KVEvents,
    SequenceTimes,
    StartFailed,
    StepStats,
    Submit,
)
from headrace.protocol.requests import SequenceOutput


class PoolInfo(msgspec.Struct, frozen=True):
    """Where the KV blocks lie: block i at bytes i * block_bytes of memory that can be opened by name."""

    path: str
    size: int
    block_bytes: int
    block_size: int
    """Positions of a block."""


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The engine's first message."""

    engine: EngineInfo
    pool: PoolInfo | None
    """None where blocks do not travel."""


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """What one step brought, or what ended without one."""

    outputs: list[SequenceOutput]
    stats: StepStats
    times: list[SequenceTimes]
    handoffs: list[HandoffEvent]
    taken: list[str] = []
    """Requests taken in since the last of these messages."""
    kv: KVEvents | None = None
    """How the prefix cache has changed since then, if it has."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Exports were taken in, before the step that may complete them: a target can dial while they compute."""

    handoffs: list[HandoffEvent]


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine raised and ends; nothing of what it had will end by itself."""

    message: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Ping`."""

    step: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer when no step runs."""


class Continue(msgspec.Struct, frozen=True, tag=True):
    """Decode an import after these tokens; without `imported` its prompt is computed here first."""

    request_id: str
    imported: bool
    generated: list[int]


class Release(msgspec.Struct, frozen=True, tag=True):
    """No transfer touches the blocks of this leg any more."""

    request_id: str


FromEngine = EngineReady | StartFailed | Accepted | Stepped | EngineFailed | Pong
ToEngine = Submit | Cancel | Ping | Continue | Release
