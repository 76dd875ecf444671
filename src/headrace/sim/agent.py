"""A memory agent in a simulation: its reads are connections of the simulated network, where all faults are.

In: a host's network and a memory. Out: `MemoryAgent`. It must not know faults. Like a NIXL agent it answers
only while it is `serving`, goes on writing for a moment where a read is given up, and ends with all that it
reads for others when one of its reads does not end well.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator, Sequence

import msgspec

from headrace.world import (
    Connection,
    ConnectionLost,
    Listener,
    Memory,
    MemoryAgent,
    Network,
    ReadFailed,
)
from headrace.world.launcher import to_the_end
from headrace.world.network import join_host_port

CONNECT_TIMEOUT_S = 5.0
QUIET_S = 0.5
"""How long a read that is given up may still take to be over by itself."""
RESTART_S = 0.3
"""How long an agent that was lost takes to stand again."""

_COUNT_BYTES = 8


class SimAgent(MemoryAgent):
    """From `listen` to `close`."""

    def __init__(self, network: Network, memory: Memory, host: str, ports: Iterator[int]) -> None:
        self.address = b""
        self._network = network
        self._memory = memory
        self._host = host
        self._ports = ports
        self._serving = asyncio.Event()
        self._servings = 0
        self._tasks: dict[asyncio.Task[None], None] = {}
        """Reads and answers under way, which end with this life of the agent."""
        self._restart: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._closed = False

    async def listen(self) -> None:
        """Let peers read."""
        address = join_host_port(self._host, next(self._ports))
        self._listener = await self._network.listen(address, self._answer, plain=True)
        self.address = address.encode()

    async def read(self, peer: bytes, ours: Sequence[int], theirs: Sequence[int], size: int) -> None:
        if not self.address:
            raise ReadFailed("the agent was lost and starts again")
        if min(ours) < 0 or max(ours) + size > self._memory.buffer.nbytes:
            raise ReadFailed("there is no such memory here")
        task = asyncio.create_task(self._read(peer, ours, theirs, size), name="agent.read")
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            await to_the_end(self._quiet(task))
            raise
        if task.cancelled():
            raise ReadFailed("the agent was lost")
        if (error := task.exception()) is not None:
            await to_the_end(self._lose())
            raise ReadFailed(str(error)) from error

    async def _quiet(self, task: asyncio.Task[None]) -> None:
        await asyncio.wait({task}, timeout=QUIET_S)
        if not task.done() or task.cancelled() or task.exception() is not None:
            await self._lose()

    async def _read(self, peer: bytes, ours: Sequence[int], theirs: Sequence[int], size: int) -> None:
        """Raises OSError, asyncio.IncompleteReadError."""
        connection = await self._network.connect(peer.decode(), timeout_s=CONNECT_TIMEOUT_S, plain=True)
        try:
            order = msgspec.msgpack.encode((list(theirs), size))
            connection.write(len(order).to_bytes(_COUNT_BYTES, "big") + order)
            await connection.read_into([self._memory.buffer[at : at + size] for at in ours])
        finally:
            connection.abort()

    async def _answer(self, connection: Connection) -> None:
        """Let one peer read once."""
        task = asyncio.current_task()
        if task is None or self._closed:
            return
        self._tasks[task] = None
        try:
            count = int.from_bytes(await connection.read_exactly(_COUNT_BYTES), "big")
            offsets, size = msgspec.msgpack.decode(
                await connection.read_exactly(count), type=tuple[list[int], int]
            )
            if min(offsets) < 0 or max(offsets) + size > self._memory.buffer.nbytes:
                return
            for offset in offsets:
                await self._serving.wait()
                await connection.write_from([self._memory.buffer[offset : offset + size]])
        except (ConnectionLost, asyncio.IncompleteReadError, msgspec.DecodeError):
            connection.abort()
        finally:
            self._forget(task)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        self._servings += 1
        self._serving.set()
        try:
            yield
        finally:
            self._servings -= 1
            if not self._servings:
                self._serving.clear()

    async def checksums(self, offsets: Sequence[int], size: int) -> list[int]:
        if not self.address:
            raise ReadFailed("the agent was lost and starts again")
        return [zlib.crc32(self._memory.buffer[offset : offset + size]) for offset in offsets]

    def kill(self) -> bool:
        """Let it die, as a process does; False where none stands."""
        if not self.address or self._closed:
            return False
        self._dying = asyncio.create_task(self._lose(), name="agent.killed")
        return True

    async def _lose(self) -> None:
        """End this life of the agent; another one begins soon."""
        if self.address:
            await self._hide()
            self._restart = asyncio.create_task(self._again(), name="agent.restart")
        await self._end_tasks()

    async def _hide(self) -> None:
        self.address = b""
        if self._listener is not None:
            await self._listener.close()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self) -> None:
        await asyncio.sleep(RESTART_S)
        with contextlib.suppress(OSError):  # its machine is down
            await self.listen()

    async def close(self) -> None:
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        await self._hide()
        await to_the_end(self._end_tasks())
