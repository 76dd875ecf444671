"""Bulk bytes of connections against a bare socket copy: two processes, loopback TCP, the same buffers.

The bare copy is `sendall` from and `recv_into` the same memory on blocking sockets, without a checksum. Both
take turns and the medians are compared. Ends with exit code 1 when a ratio is below the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection as Pipe

import uvloop
from rich.console import Console
from rich.table import Table

from headrace.world.streams import StreamNetwork

LIMIT = 0.8
SIZES = (368_640, 5 << 20)
"""A block of a small model's cache, and of a large one's."""
TOTAL_BYTES = 256 << 20
"""What one measurement moves."""
RESIDENT_BYTES = 64 << 20
"""What it moves them from and to: more than the caches hold, as a pool of blocks is."""


def buffers(size: int) -> list[memoryview]:
    """As many buffers as one measurement has, over memory that is used several times."""
    memory = memoryview(bytearray(b"\1" * RESIDENT_BYTES))
    distinct = [memory[i : i + size] for i in range(0, RESIDENT_BYTES - size + 1, size)]
    return [distinct[i % len(distinct)] for i in range(TOTAL_BYTES // size)]


def sender(pipe: Pipe, bare_port: int, address: str) -> None:
    async def main() -> None:
        connection = await StreamNetwork().connect(address, timeout_s=5)
        while (order := await asyncio.to_thread(pipe.recv)) is not None:
            how, size = order
            pieces = parts[size]
            if how == "bulk":
                await connection.write_from(pieces)
            else:
                for piece in pieces:
                    bare.sendall(piece)
        await connection.close()

    parts = {size: buffers(size) for size in SIZES}
    with socket.create_connection(("127.0.0.1", bare_port)) as bare:
        uvloop.run(main())


def receive_bare(sock: socket.socket, pieces: list[memoryview]) -> None:
    for piece in pieces:
        filled = 0
        while filled < len(piece):
            filled += sock.recv_into(piece[filled:])


async def measure(repeats: int) -> dict[int, dict[str, float]]:
    """Bytes per second, by size and kind."""
    accepted = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def handler(connection: object) -> None:
        accepted.set_result(connection)
        await done.wait()

    listener = await StreamNetwork().listen("127.0.0.1:0", handler)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    parts = {size: buffers(size) for size in SIZES}
    rates: dict[int, dict[str, list[float]]] = {size: {"bulk": [], "bare": []} for size in SIZES}
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=sender, args=(theirs, server.getsockname()[1], listener.address)
        )
        process.start()
        bare, _ = await asyncio.to_thread(server.accept)
        connection = await accepted
        with bare:
            for turn in range(repeats + 1):
                for size in SIZES:
                    for how in ("bulk", "bare"):
                        start = time.perf_counter()
                        ours.send((how, size))
                        if how == "bulk":
                            await connection.read_into(parts[size])
                        else:
                            await asyncio.to_thread(receive_bare, bare, parts[size])
                        if turn:  # the first one warms up
                            moved = sum(map(len, parts[size]))
                            rates[size][how].append(moved / (time.perf_counter() - start))
            ours.send(None)
            await asyncio.to_thread(process.join)
    done.set()
    await listener.close()
    return {size: {how: statistics.median(of) for how, of in kinds.items()} for size, kinds in rates.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    rates = uvloop.run(measure(parser.parse_args().repeats))
    table = Table("bytes per buffer", "bulk GB/s", "bare GB/s", "ratio")
    ratios = []
    for size, of in rates.items():
        ratios.append(of["bulk"] / of["bare"])
        table.add_row(f"{size:,}", f"{of['bulk'] / 1e9:.2f}", f"{of['bare'] / 1e9:.2f}", f"{ratios[-1]:.2f}")
    Console().print(table)
    return 0 if min(ratios) >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
