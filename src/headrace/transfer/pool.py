"""A worker's KV blocks as memory: what transfers read from and write into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pool:
    """Block i lies at bytes [i * block_bytes, (i + 1) * block_bytes) of `memory`."""

    memory: memoryview
    block_bytes: int
    block_size: int
    """Positions of a block."""
    layout: str
    """Blocks of equal layout can be copied from pool to pool."""

    def views(self, blocks: Iterable[int]) -> list[memoryview]:
        """The memory of these blocks, in order."""
        size = self.block_bytes
        return [self.memory[block * size : (block + 1) * size] for block in blocks]
