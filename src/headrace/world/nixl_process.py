"""The process in which a NIXL agent lives: orders in on a socket, bytes from peers' memory into ours.

    python -m headrace.world.nixl_process FD PARENT_PID PATH SIZE ERRORS

FD is a socket of `nixl_messages`; PATH and SIZE are shared memory's; ERRORS is UCX's error handling. It ends
with that socket and with its parent.

NIXL's transport, UCX, ends its process where it meets what it did not foresee (seen: a reader over TCP that
stopped for a while and was gone when its source went on), and cannot take back a read that its peer does not
answer. In a process of its own the first costs nobody else anything, and killing it ends the second for sure.

The agent has no progress thread. It is polled while transfers are out, at once again as long as something
moves and after growing pauses when nothing does; otherwise the process waits for orders and
uses no processor.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import select
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace import _native
from headrace.world.launcher import die_with_parent
from headrace.world.nixl_messages import (
    PACKAGES,
    PREFIX_BYTES,
    Done,
    FromAgent,
    Read,
    Ready,
    Serve,
    Stop,
    Sum,
    ToAgent,
    Where,
    frame,
)
from headrace.world.shared_memory import open_shared_memory

MAX_PEERS = 256
"""Connections that are kept; beyond, the one that was not used for the longest time goes."""

BUSY_S = 20e-6
"""A poll that takes longer than this has moved something."""
SHORTEST_PAUSE_S = 20e-6
LONGEST_PAUSE_S = 200e-6
"""Pauses between polls that move nothing."""

TOGETHER_BYTES = 32 << 20
"""So much is posted together, and a read can be stopped after it: over shared memory NIXL moves all that is
posted before it returns."""

Descriptor = tuple[int, int, int]
"""Address, length and device, as NIXL has it."""

_RECEIVE_BYTES = 1 << 20


@dataclass(slots=True)
class _Reading:
    """What is to be read for one order."""

    peer: str
    left: list[tuple[list[Descriptor], list[Descriptor]]]
    """What is not posted yet, as (ours, theirs), the next last."""
    handle: Any = None
    """NIXL's, of what is posted."""


class _Agent:
    """One agent over one piece of memory."""

    def __init__(
        self, sock: socket.socket, nixl: Any, version: str, path: str, size: int, errors: str
    ) -> None:
        self._sock = sock
        self._memory = open_shared_memory(path, size)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory.buffer))
        self._version = version
        # No progress thread, no listener of NIXL's own; metadata travels in messages of ours.
        config = nixl.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=[])
        self._agent = nixl.nixl_agent(os.urandom(8).hex(), config)
        self._agent.create_backend("UCX", {"ucx_error_handling_mode": errors})
        memory = self._agent.get_reg_descs([(self._base, size, 0, "")], mem_type="DRAM")
        self._agent.register_memory(memory, backends=["UCX"])
        self._decoder: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
        self._received = bytearray()
        self._peers: OrderedDict[bytes, tuple[str, Where]] = OrderedDict()
        self._reads: dict[int, _Reading] = {}
        self._serving = False
        self._pause_s = 0.0

    def run(self) -> None:
        """Obey until the socket ends."""
        metadata = bytes(self._agent.get_agent_metadata())
        address = msgspec.msgpack.encode(Where(self._version, metadata, self._base, self._memory.nbytes))
        self._say(Ready(address))
        while self._listen():
            if self._reads or self._serving:
                self._poll()

    def _listen(self) -> bool:
        """Take the orders that have come; without transfers, wait for some. False at the socket's end."""
        timeout_s = self._pause_s if self._reads or self._serving else None
        if not select.select([self._sock], [], [], timeout_s)[0]:
            return True
        if not (data := self._sock.recv(_RECEIVE_BYTES)):
            return False
        self._received += data
        while len(self._received) >= PREFIX_BYTES:
            end = PREFIX_BYTES + int.from_bytes(self._received[:PREFIX_BYTES], "big")
            if len(self._received) < end:
                break
            order = self._decoder.decode(self._received[PREFIX_BYTES:end])
            del self._received[:end]
            self._pause_s = 0.0
            self._obey(order)
        return True

    def _obey(self, order: ToAgent) -> None:
        match order:
            case Serve(on=on):
                self._serving = on
            case Sum():
                self._say(Done(order.number, checksums=self._sums(order.offsets, order.size)))
            case Read():
                self._begin(order)
            case Stop(number=number):
                if number in self._reads:
                    self._reads[number].left.clear()

    def _sums(self, offsets: Sequence[int], size: int) -> list[int]:
        memory = self._memory.buffer
        return [_native.crc32c(memory[offset : offset + size]) for offset in offsets]

    def _begin(self, order: Read) -> None:
        """Take a read on; `_poll` reads."""
        try:
            name, where = self._peer(order.peer)
            for offsets, limit in ((order.ours, self._memory.nbytes), (order.theirs, where.size)):
                if min(offsets) < 0 or max(offsets) + order.size > limit:
                    raise ValueError(f"{order.size} bytes are asked for outside of a memory of {limit}")
        except Exception as error:  # NIXL's are many, and whoever asked is told
            self._say(Done(order.number, error=_in_words(error), quiet=True))
            return
        ours = [(self._base + offset, order.size, 0) for offset in order.ours]
        theirs = [(where.base + offset, order.size, 0) for offset in order.theirs]
        together = max(1, TOGETHER_BYTES // order.size)
        left = [
            (ours[start : start + together], theirs[start : start + together])
            for start in range(0, len(ours), together)
        ]
        self._reads[order.number] = _Reading(name, left[::-1])

    def _peer(self, address: bytes) -> tuple[str, Where]:
        """A peer by its address; a new one is met."""
        known = self._peers.get(address)
        if known is not None:
            self._peers.move_to_end(address)
            return known
        where = msgspec.msgpack.decode(address, type=Where)
        if where.version != self._version:
            raise ValueError(f"its NIXL is {where.version}, and ours {self._version}")
        if len(self._peers) >= MAX_PEERS and not self._reads:
            _, (oldest, _) = self._peers.popitem(last=False)
            self._agent.remove_remote_agent(oldest)
        name = self._agent.add_remote_agent(where.metadata)
        self._peers[address] = name.decode() if isinstance(name, bytes) else name, where
        return self._peers[address]

    def _poll(self) -> None:
        """Let the transport move what it can, and see what is over."""
        began_s = time.perf_counter()
        self._agent.get_new_notifs()
        for number, reading in list(self._reads.items()):
            posted = reading.handle is not None
            try:
                over = self._advance(reading)
            except Exception as error:
                posted = posted or reading.handle is not None
                del self._reads[number]
                self._say(Done(number, error=_in_words(error), quiet=not posted))
            else:
                if over:
                    del self._reads[number]
                    self._say(Done(number))
        if time.perf_counter() - began_s > BUSY_S:
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def _advance(self, reading: _Reading) -> bool:
        """See how a read stands, and post more of it; returns whether it is over. Raises NIXL's errors."""
        if reading.handle is None:
            if not reading.left:
                return True
            descriptors = (self._agent.get_xfer_descs(each, mem_type="DRAM") for each in reading.left.pop())
            reading.handle = self._agent.initialize_xfer("READ", *descriptors, reading.peer, backends=["UCX"])
            state = self._agent.transfer(reading.handle)
        else:
            state = self._agent.check_xfer_state(reading.handle)
        if state == "PROC":
            return False
        if state != "DONE":  # its handle is not touched again: nobody knows what still moves
            raise RuntimeError(f"the transfer's state is {state}")
        self._agent.release_xfer_handle(reading.handle)
        reading.handle = None
        return not reading.left

    def _say(self, message: FromAgent) -> None:
        self._sock.sendall(frame(message))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _package() -> tuple[Any, str]:
    """NIXL and its version. Raises ImportError."""
    for name in PACKAGES:
        try:
            return importlib.import_module(name), importlib.metadata.version(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(f"none of {', '.join(PACKAGES)} is installed")


def main(arguments: list[str]) -> None:
    fd, parent, path, size, errors = arguments
    die_with_parent(int(parent))
    with socket.socket(fileno=int(fd)) as sock:
        nixl, version = _package()
        _Agent(sock, nixl, version, path, int(size), errors).run()
    os._exit(0)  # the transport's own way out can wait for peers


if __name__ == "__main__":
    main(sys.argv[1:])
