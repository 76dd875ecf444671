"""Bulk bytes over a simulated connection: as ordinary ones, through the transport's queues, piece by piece.

In: the caller's memory. Out: simulated bytes, to which the virtual clock and every fault apply, and their
checksums. It must not know faults. What has been read before a loss is in the caller's memory, as it would be
on real machines; and a move that is told to stop goes on for a moment, as `world/bulk.py` does: only when it
has ended is the memory left alone.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Coroutine, Sequence
from typing import Any

from headrace.world.connection import TransportConnection

PIECE_BYTES = 64 * 1024
AFTERWARDS_BYTES = 4096
"""At most so much is moved after a move was told to stop."""


class SimConnection(TransportConnection):
    """A connection over a `SimTransport`."""

    _allowed: int | None = None
    """How many bytes may still be moved by what was told to stop."""

    async def _send_buffers(self, buffers: Sequence[memoryview], stop: asyncio.Future[None]) -> list[int]:
        return await self._moved(self._send(buffers))

    async def _fill_buffers(self, buffers: Sequence[memoryview]) -> list[int]:
        return await self._moved(self._fill(buffers))

    async def _moved(self, moving: Coroutine[Any, Any, list[int]]) -> list[int]:
        """Move to the end; where this is cancelled, for a moment longer."""
        task = asyncio.create_task(moving, name="bulk")
        cancellation: asyncio.CancelledError | None = None
        quiet = asyncio.get_running_loop().create_future()
        while not task.done() and not quiet.done():
            try:
                await asyncio.wait([task, quiet], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError as error:
                if cancellation is None:
                    self._allowed = AFTERWARDS_BYTES
                    quiet_after_s = self.transport.get_extra_info("quiet_after_s")
                    asyncio.get_running_loop().call_later(quiet_after_s, quiet.set_result, None)
                cancellation = error
        if cancellation is None:
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise cancellation

    async def _allow(self, count: int) -> int:
        """How many of `count` bytes may be moved now; of a move that was told to stop, few more."""
        if self._allowed is None:
            return count
        if self._allowed <= 0:
            await asyncio.get_running_loop().create_future()
        count = min(count, self._allowed)
        self._allowed -= count
        return count

    async def _send(self, buffers: Sequence[memoryview]) -> list[int]:
        checksums = []
        for buffer in buffers:
            view, checksum = buffer.cast("B"), 0
            for start in range(0, len(view), PIECE_BYTES):
                await self._allow(PIECE_BYTES)
                piece = bytes(view[start : start + PIECE_BYTES])
                checksum = zlib.crc32(piece, checksum)
                self.transport.write(piece)
                await self._all_sent()
            checksums.append(checksum)
        return checksums

    async def _fill(self, buffers: Sequence[memoryview]) -> list[int]:
        checksums = []
        total = sum(buffer.nbytes for buffer in buffers)
        for buffer in buffers:
            view, checksum, filled = buffer.cast("B"), 0, 0
            while filled < len(view):
                if not self._received:
                    if self._end_of_input():
                        raise asyncio.IncompleteReadError(b"", total)
                    await self._more_input()
                    continue
                most = await self._allow(len(self._received))
                piece = self._take(min(len(view) - filled, most))
                view[filled : filled + len(piece)] = piece
                checksum = zlib.crc32(piece, checksum)
                filled += len(piece)
            checksums.append(checksum)
        return checksums
