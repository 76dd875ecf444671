"""Bulk bytes over a socket: between its descriptor and the caller's memory, past transport and interpreter.

In: a socket whose transport is quiet in the direction that is used, and memory pinned in a `_native.Bulk`.
Out: the status with which the bytes stopped moving. It must not know connections.

Threads move bytes only while bytes flow. When the peer is behind they go back to their pool and the event
loop watches the socket, so a stalled peer costs neither a thread nor processor time. The socket is watched
and used through a duplicate of its descriptor: the transport may close its own at any time, and the number
could be somebody else's by then.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headrace import _native

THREADS = 4
"""At most as many transfers move at the same moment; the others take turns of some tens of milliseconds."""

RETRY_S = 0.5
"""A stalled socket is tried again after this time although the event loop has not reported it."""


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="bulk")


async def move(sock: socket.socket, bulk: _native.Bulk, *, sending: bool, stop: asyncio.Future[None]) -> int:
    """Move all bytes of `bulk`; return a status of `_native.Bulk`, never BLOCKED or YIELDED.

    Ends early with CANCELLED once `stop` is done, and when it is cancelled itself; in every case only when no
    thread touches the memory any more. Raises OSError when the socket is closed already.
    """
    fd = os.dup(sock.fileno())
    try:
        while True:
            status = await _step(functools.partial(bulk.send if sending else bulk.receive, fd), bulk, stop)
            if status == _native.BULK_BLOCKED:
                await _ready(fd, sending, stop)
            elif status != _native.BULK_YIELDED:
                return status
            if stop.done():
                return _native.BULK_CANCELLED
    finally:
        os.close(fd)


async def _step(call: Callable[[], int], bulk: _native.Bulk, stop: asyncio.Future[None]) -> int:
    """One call on a thread; it is over when this is, however this ends."""
    job = _threads().submit(call)
    result = asyncio.wrap_future(job)
    waited: list[asyncio.Future[Any]] = [result, stop]
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not result.done():
            bulk.cancel()
            job.cancel()  # ends it only if no thread has begun with it
            await _settled(result)
    return _native.BULK_CANCELLED if result.cancelled() else result.result()


async def _settled(result: asyncio.Future[int]) -> None:
    """Wait for `result` to be done, and let a cancellation of this task wait as well."""
    cancellation: asyncio.CancelledError | None = None
    while not result.done():
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation


async def _ready(fd: int, sending: bool, stop: asyncio.Future[None]) -> None:
    """Wait until the socket may take or have bytes again."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_writer if sending else loop.add_reader)(fd, wake)
    try:
        await asyncio.wait([ready, stop], timeout=RETRY_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        (loop.remove_writer if sending else loop.remove_reader)(fd)
