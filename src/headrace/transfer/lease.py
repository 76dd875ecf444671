"""One export that others may fetch: what is computed of it, where that lies, and in which state it is."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

BlockName = tuple[int, int]
"""KV group and number of a block."""


class State(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    HELD = "held"
    QUARANTINED = "quarantined"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Lease:
    request_id: str
    token: bytes
    block_size: int
    """Positions of a block."""
    numbers: int
    """How many blocks of one KV group the prompt fills, the last one perhaps in part."""
    state: State = State.QUEUED
    positions: int = 0
    blocks: dict[BlockName, int] = field(default_factory=dict)
    """By name, the place in the pool."""
    reader: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    how: str = ""

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def ready(self, names: Sequence[BlockName], most: int) -> list[int]:
        """Where the first of these blocks lie, at most so many, up to one that is not computed to its end."""
        places: list[int] = []
        for name in names[:most]:
            if not self._is_ready(name):
                break
            places.append(self.blocks[name])
        return places

    def _is_ready(self, name: BlockName) -> bool:
        """The last block of a prompt may be filled in part only."""
        if name not in self.blocks:
            return False
        return self.state is State.HELD or (name[1] + 1) * self.block_size <= self.positions
