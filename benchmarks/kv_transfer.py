"""Whole pulls of a prompt's KV blocks against a bare socket copy of the same bytes, over loopback TCP.

Source and target are two processes with their pools in shared memory, as workers have them, and run what
workers run: `Exports` here, `fetch` there, with connecting, checksums and confirmation in the time. The bare
copy is `sendall` from and `recv_into` the same blocks on blocking sockets that are connected already, without
a checksum. Both take turns and the ratio is the median over turns, as what else the machine does meets both.
Exit code 1 when a ratio is below the limit.

Blocks lie scattered in the pool, as those of a prompt do in one that has served for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
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
from headrace.transfer import Exports, Pool, fetch
from headrace.world import real_world
from headrace.world.shared_memory import SharedMemory

LIMIT = 0.8
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


def source(pipe: Pipe, shape: Shape, bare_port: int) -> None:
    """Offer the blocks, in either way, as often as the pipe asks."""

    async def main() -> None:
        released = asyncio.Event()
        exports = Exports(
            real_world(),
            end.pool,
            worker_id="source",
            generation=1,
            released=lambda name, how: released.set(),
        )
        await exports.listen("127.0.0.1:0")
        number = 0
        while (how := await asyncio.to_thread(pipe.recv)) is not None:
            if how == "bare":
                for view in end.views:
                    bare.sendall(view)
                continue
            number += 1
            name = f"request {number}"
            released.clear()
            ticket = exports.offer(Exporting(name, shape.tokens, []))
            exports.computed(Computed(name, shape.tokens, end.span))
            exports.held(name)
            pipe.send(ticket)
            await released.wait()
        await exports.close()

    end = End(shape, seed=1)
    with socket.create_connection(("127.0.0.1", bare_port)) as bare:
        asyncio.run(main())


def receive_bare(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        filled = 0
        while filled < len(view):
            filled += sock.recv_into(view[filled:])


async def pull(end: End, shape: Shape, ticket: Ticket) -> None:
    await fetch(real_world(), end.pool, Reserved("import", shape.tokens, 0, end.span, []), ticket)


async def measure(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Seconds by way."""
    end = End(shape, seed=2)
    took: dict[str, list[float]] = {"tcp": [], "bare": []}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = context.Process(target=source, args=(theirs, shape, server.getsockname()[1]))
        process.start()
        bare, _ = await asyncio.to_thread(server.accept)
    with bare:
        for turn in range(repeats + 1):
            for how in ("tcp", "bare"):
                end.memory.buffer[:1] = b"\0"
                ours.send(how)
                if how == "tcp":
                    ticket = await asyncio.to_thread(ours.recv)
                    began = time.perf_counter()
                    await pull(end, shape, ticket)
                else:
                    began = time.perf_counter()
                    await asyncio.to_thread(receive_bare, bare, end.views)
                if turn:  # the first one warms up
                    took[how].append(time.perf_counter() - began)
                assert end.memory.buffer[0] == 1, "nothing arrived"
        ours.send(None)
        await asyncio.to_thread(process.join)
    end.memory.close()
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    table = Table("cache", "block", "bytes moved", "tcp GB/s", "bare GB/s", "ratio")
    ratios = []
    for shape in SHAPES:
        took = asyncio.run(measure(shape, repeats))
        median = {how: statistics.median(of) for how, of in took.items()}
        ratios.append(statistics.median(b / t for b, t in zip(took["bare"], took["tcp"], strict=True)))
        table.add_row(
            shape.name,
            f"{shape.block_bytes:,}",
            f"{shape.nbytes:,}",
            f"{shape.nbytes / median['tcp'] / 1e9:.2f}",
            f"{shape.nbytes / median['bare'] / 1e9:.2f}",
            f"{ratios[-1]:.2f}",
        )
    Console().print(table)
    return 0 if min(ratios) >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
