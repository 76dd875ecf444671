"""Real NIXL agents, each in a process of its own, over shared memory of this one."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable

import pytest

from headrace.world.agent import MemoryAgent
from headrace.world.nixl import open_nixl
from headrace.world.nixl_messages import PACKAGES
from headrace.world.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in PACKAGES),
    reason="NIXL is not installed (pip install 'headrace[nixl]')",
)

SIZE = 1 << 20
PIECE = 4096


def between_two(
    body: Callable[[MemoryAgent, SharedMemory, MemoryAgent, SharedMemory], Awaitable[None]],
) -> None:
    """Run `body` with a source and a target agent."""

    async def main() -> None:
        source_memory, target_memory = SharedMemory(SIZE), SharedMemory(SIZE)
        source = await open_nixl(source_memory.path, SIZE, "127.0.0.1:0")
        target = await open_nixl(target_memory.path, SIZE, "127.0.0.1:0")
        try:
            await body(source, source_memory, target, target_memory)
        finally:
            await asyncio.gather(source.close(), target.close())
            source_memory.close()
            target_memory.close()

    asyncio.run(main())


def test_a_block_is_read_from_another_process() -> None:
    async def body(
        source: MemoryAgent, theirs: SharedMemory, target: MemoryAgent, ours: SharedMemory
    ) -> None:
        theirs.buffer[PIECE : 2 * PIECE] = bytes(range(256)) * (PIECE // 256)
        with source.serving():
            await target.read(source.address, [3 * PIECE], [PIECE], PIECE)
        assert ours.buffer[3 * PIECE : 4 * PIECE] == theirs.buffer[PIECE : 2 * PIECE]
        assert not any(ours.buffer[: 3 * PIECE])
        assert not any(ours.buffer[4 * PIECE :])

    between_two(body)
