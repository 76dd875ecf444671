"""What is said of KV blocks that travel: from an engine to its supervisor, and between supervisors.

A *leg* of a handoff is one attempt at one worker, named by its request id: the export where the prompt is
prefilled, the import where the tokens will be decoded. Blocks are named by KV group and number: block j of a
group holds positions j * block_size onwards.
"""

from __future__ import annotations

import enum

import msgspec


class Leg(enum.StrEnum):
    """What an attempt at a request is to a worker."""

    WHOLE = "whole"
    """Prefill and decode here."""
    EXPORT = "export"
    """Prefill, sample the first token of sample 0, and hold the blocks until they were fetched."""
    IMPORT = "import"
    """Reserve blocks for the prompt, wait until they are filled or that has failed, and decode."""


class Cause(enum.StrEnum):
    """Why blocks did not come, or may not be used."""

    UNREACHABLE = "unreachable"  # no connection to the source came about
    LOST = "lost"  # it broke, or the source ended it
    DENIED = "denied"  # the source does not hold them any more: expired, dropped, of another life
    MISMATCH = "mismatch"  # they are of another prompt, model, precision, tenant or layout
    CORRUPT = "corrupt"  # checksums differ, or what came is no answer
    STALLED = "stalled"  # nothing came for too long
    ABANDONED = "abandoned"  # nobody prefills any more


class BlockSpan(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive blocks of one KV group."""

    group: int
    first: int
    """The number of the first block of the span."""
    blocks: list[int]
    """Where they lie in the worker's pool."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """The right to fetch the blocks of one export. Data: whoever has it may, until the source says no."""

    token: bytes
    """Unguessable. It is told over the control channel, and shown in plain on the data plane."""
    address: str
    """Where the source serves blocks."""
    memory: bytes = b""
    """How agents of other workers read the source's memory (`world/agent.py`); empty where none can."""
    worker_id: str
    generation: int
    """The life of the source's engine; the blocks end with it."""
    kv_layout: str
    prompt_tokens: int
    identities: list[bytes]


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """An import has its blocks; `fill` are those that must come from elsewhere."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    fill: list[BlockSpan]
    identities: list[bytes]
    """Of blocks 0 onwards of the prompt, the last one perhaps of a part of a block."""


class Declined(msgspec.Struct, frozen=True, tag=True):
    """An import needs no handoff after all, so much of its prompt is cached; it runs whole."""

    request_id: str
    cached_tokens: int


class Exporting(msgspec.Struct, frozen=True, tag=True):
    """An export was accepted; nothing of it is computed yet."""

    request_id: str
    prompt_tokens: int
    identities: list[bytes]
    """As in `Reserved`: equal ones mean equal tokens, model, precision, layout and tenant."""


class Computed(msgspec.Struct, frozen=True, tag=True):
    """An export has come so far: positions below `positions` may be read, from these further blocks."""

    request_id: str
    positions: int
    spans: list[BlockSpan]


class Held(msgspec.Struct, frozen=True, tag=True):
    """An export is complete, its first token sampled; its blocks wait to be fetched, then for `release`."""

    request_id: str


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """A leg ended before its handoff did; its blocks stay untouched until the transport is quiet and says so
    with `release`."""

    request_id: str


HandoffEvent = Reserved | Declined | Exporting | Computed | Held | Dropped
