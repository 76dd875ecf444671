"""Whole pulls of a prompt's KV blocks against what their transport does by itself with the same bytes.

Source and target are two processes with their pools in shared memory, as workers have them, and run what
workers run: `Exports` here, `fetch` there, with connecting, checksums (tcp) and confirmation in the time.
Each way has a bare one beside it:

- tcp: `sendall` from and `recv_into` the same blocks on blocking sockets over loopback that are connected
  already, without a checksum.
- nixl: one read of all bytes as one piece by NIXL agents of these two processes, which have met already, with
  the same settings. The source is polled again at once while that moves something, else after 50 us: without
  that pause it would take a core from the reader where cores are few.

All take turns and a ratio is the median over turns, as what else the machine does meets all. Exit code 1 when
one is below its limit. `UCX_TLS=tcp` in the environment has NIXL go over TCP, as between machines.

Blocks lie scattered in the pool, as those of a prompt do in one that has served for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe

from rich.console import Console
from rich.table import Table

from headrace.protocol.handoff import BlockSpan, Computed, Exporting, Reserved, Ticket
from headrace.transfer import Connector, Exports, Pool, fetch
from headrace.world import MemoryAgent, real_world
from headrace.world.nixl import LOOPBACK, settings
from headrace.world.nixl_process import BUSY_S
from headrace.world.shared_memory import SharedMemory

LIMITS = {"tcp": 0.8, "nixl": 0.9}
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """A prompt's cache."""

    name: str
    block_bytes: int
    blocks: int

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_SIZE

    @property
    def nbytes(self) -> int:
        return self.block_bytes * self.blocks


def cache(name: str, layers: int, kv_heads: int, head_size: int, tokens: int) -> Shape:
    """Of a model in bfloat16."""
    blocks = tokens // BLOCK_SIZE
    return Shape(name, layers * kv_heads * head_size * 2 * 2 * BLOCK_SIZE, blocks)


SHAPES = (
    cache("SmolLM2-135M, 4,096 tokens", layers=30, kv_heads=3, head_size=64, tokens=4096),
    cache("70B-shaped, 1,600 tokens", layers=80, kv_heads=8, head_size=128, tokens=1600),
)


class End:
    """One side's pool, and where this side's blocks lie in it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.memory = SharedMemory(shape.nbytes)
        self.memory.buffer[:] = bytes([seed]) * shape.nbytes
        self.pool = Pool(self.memory.buffer, shape.block_bytes, BLOCK_SIZE, shape.name)
        self.places = list(range(shape.blocks))
        random.Random(seed).shuffle(self.places)
        self.views = self.pool.views(self.places)
        self.span = [BlockSpan(0, 0, self.places)]


class BareNixl:
    """A NIXL agent of this process over all of an end's memory."""

    def __init__(self, memory: SharedMemory) -> None:
        import nixl_cu12 as nixl

        environment, errors = settings("127.0.0.1:0", LOOPBACK)
        before = dict(os.environ)
        os.environ.update(environment)
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
        self.agent = nixl.nixl_agent(os.urandom(8).hex(), config)
        self.agent.create_backend("UCX", {"ucx_error_handling_mode": errors})
        os.environ.clear()
        os.environ.update(before)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory.buffer))
        self._size = memory.nbytes
        whole = self.agent.get_reg_descs([(self.base, self._size, 0, "")], mem_type="DRAM")
        self.agent.register_memory(whole)

    def poll(self) -> None:
        began = time.perf_counter()
        self.agent.get_new_notifs()
        if time.perf_counter() - began < BUSY_S:
            time.sleep(50e-6)

    def read(self, peer: str, base: int) -> None:
        """All of the peer's memory into ours, as one piece."""
        ours, theirs = (
            self.agent.get_xfer_descs([(at, self._size, 0)], mem_type="DRAM") for at in (self.base, base)
        )
        handle = self.agent.initialize_xfer("READ", ours, theirs, peer)
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        assert state == "DONE", state
        self.agent.release_xfer_handle(handle)


async def open_agent(end: End) -> MemoryAgent:
    return await real_world().open_agent(end.memory.path, end.memory.nbytes, "127.0.0.1:0", print)


def source(pipe: Pipe, shape: Shape, bare_port: int) -> None:
    """Offer the blocks, in either way, as often as the pipe asks."""

    async def main() -> None:
        released = asyncio.Event()
        agent, bare_nixl = await open_agent(end), BareNixl(end.memory)
        pipe.send((bytes(bare_nixl.agent.get_agent_metadata()), bare_nixl.base))
        world = real_world()
        listener = await world.network.listen(
            "127.0.0.1:0", lambda connection: exports.serve(connection), plain=True
        )
        exports = Exports(
            world,
            end.pool,
            worker_id="source",
            generation=1,
            address=listener.address,
            released=lambda name, how: released.set(),
            agent=agent,
        )
        number = 0
        while (how := await asyncio.to_thread(pipe.recv)) is not None:
            if how == "bare":
                for view in end.views:
                    bare.sendall(view)
                continue
            if how == "large read":
                while not pipe.poll():
                    bare_nixl.poll()
                pipe.recv()
                continue
            number += 1
            name = f"request {number}"
            released.clear()
            ticket = exports.offer(Exporting(name, shape.tokens, []))
            exports.computed(Computed(name, shape.tokens, end.span))
            exports.held(name)
            pipe.send(ticket)
            await released.wait()
        await listener.close()
        await exports.close()
        await agent.close()

    end = End(shape, seed=1)
    with socket.create_connection(("127.0.0.1", bare_port)) as bare:
        asyncio.run(main())


def receive_bare(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        filled = 0
        while filled < len(view):
            filled += sock.recv_into(view[filled:])


async def pull(end: End, shape: Shape, ticket: Ticket, agent: MemoryAgent | None) -> None:
    reserved = Reserved("import", shape.tokens, 0, end.span, [])
    fetched = await fetch(real_world(), end.pool, reserved, ticket, connector=Connector(agent))
    assert fetched.read == (0 if agent is None else shape.blocks), "the blocks came another way"


async def measure(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Seconds by way."""
    end = End(shape, seed=2)
    took: dict[str, list[float]] = {"tcp": [], "bare": [], "nixl": [], "large read": []}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = context.Process(target=source, args=(theirs, shape, server.getsockname()[1]))
        process.start()
        bare, _ = await asyncio.to_thread(server.accept)
    agent = await open_agent(end)
    bare_nixl = BareNixl(end.memory)
    metadata, base = await asyncio.to_thread(ours.recv)
    peer = bare_nixl.agent.add_remote_agent(metadata).decode()
    with bare:
        for turn in range(repeats + 1):
            for how in took:
                end.memory.buffer[:1] = b"\0"
                ours.send(how)
                if how in ("tcp", "nixl"):
                    ticket = await asyncio.to_thread(ours.recv)
                    began = time.perf_counter()
                    await pull(end, shape, ticket, agent if how == "nixl" else None)
                elif how == "large read":
                    began = time.perf_counter()
                    await asyncio.to_thread(bare_nixl.read, peer, base)
                else:
                    began = time.perf_counter()
                    await asyncio.to_thread(receive_bare, bare, end.views)
                if turn:  # the first one warms up
                    took[how].append(time.perf_counter() - began)
                assert end.memory.buffer[0] == 1, "nothing arrived"
                if how == "large read":
                    ours.send("enough")
        ours.send(None)
        await asyncio.to_thread(process.join)
    await agent.close()
    end.memory.close()
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    table = Table("cache", "block", "bytes moved", "way", "GB/s", "bare", "bare GB/s", "ratio", "limit")
    failed = False
    for shape in SHAPES:
        took = asyncio.run(measure(shape, repeats))
        median = {how: statistics.median(of) for how, of in took.items()}
        for way, alone in (("tcp", "bare"), ("nixl", "large read")):
            ratio = statistics.median(b / t for b, t in zip(took[alone], took[way], strict=True))
            failed = failed or ratio < LIMITS[way]
            table.add_row(
                *(shape.name, f"{shape.block_bytes:,}", f"{shape.nbytes:,}"),
                *(way, f"{shape.nbytes / median[way] / 1e9:.2f}"),
                *(alone, f"{shape.nbytes / median[alone] / 1e9:.2f}"),
                *(f"{ratio:.2f}", f"{LIMITS[way]:.1f}"),
            )
    Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
