"""Bulk bytes over a simulated connection: as ordinary ones, through the transport's queues, piece by piece.

In: the caller's memory. Out: simulated bytes, to which the virtual clock and every fault apply, and their
checksums. It must not know faults. What has been read before a loss is in the caller's memory, as it would be
on real machines.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from headrace.world.connection import TransportConnection

PIECE_BYTES = 64 * 1024


class SimConnection(TransportConnection):
    """A connection over a `SimTransport`."""

    async def _send_buffers(self, buffers: Sequence[memoryview], stop: asyncio.Future[None]) -> list[int]:
        checksums = []
        for buffer in buffers:
            view, checksum = buffer.cast("B"), 0
            for start in range(0, len(view), PIECE_BYTES):
                piece = bytes(view[start : start + PIECE_BYTES])
                checksum = zlib.crc32(piece, checksum)
                self.transport.write(piece)
                await self._all_sent()
            checksums.append(checksum)
        return checksums

    async def _fill_buffers(self, buffers: Sequence[memoryview]) -> list[int]:
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
                piece = self._take(min(len(view) - filled, len(self._received)))
                view[filled : filled + len(piece)] = piece
                checksum = zlib.crc32(piece, checksum)
                filled += len(piece)
            checksums.append(checksum)
        return checksums
