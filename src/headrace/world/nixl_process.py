"""The process in which a NIXL agent lives: orders in on a socket, bytes from peers' memory into ours.

    python -m headrace.world.nixl_process FD PARENT_PID PATH SIZE

FD is a socket of `nixl_messages`; PATH and SIZE are shared memory's. It ends with that socket and with its
parent.

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

_RECEIVE_BYTES = 1 << 20


class _Agent:
    """One agent over one piece of memory."""

    def __init__(self, sock: socket.socket, nixl: Any, version: str, path: str, size: int) -> None:
        self._sock = sock
        self._memory = open_shared_memory(path, size)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory.buffer))
        self._version = version
        # No progress thread, no listener of NIXL's own; metadata travels in messages of ours.
        config = nixl.nixl_agent_config(
            enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"]
        )
        self._agent = nixl.nixl_agent(os.urandom(8).hex(), config)
        memory = self._agent.get_reg_descs([(self._base, size, 0, "")], mem_type="DRAM")
        self._agent.register_memory(memory, backends=["UCX"])
        self._decoder: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
        self._received = bytearray()
        self._peers: OrderedDict[bytes, tuple[str, Where]] = OrderedDict()
        self._reads: dict[int, Any] = {}
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
                self._read(order)

    def _sums(self, offsets: Sequence[int], size: int) -> list[int]:
        memory = self._memory.buffer
        return [_native.crc32c(memory[offset : offset + size]) for offset in offsets]

    def _read(self, order: Read) -> None:
        posted = False
        try:
            handle = self._prepare(order)
            posted = True
            self._tell(order.number, handle, self._agent.transfer(handle))
        except Exception as error:  # NIXL's are many, and whoever asked is told
            self._say(Done(order.number, error=_in_words(error), quiet=not posted))

    def _prepare(self, order: Read) -> Any:
        """The transfer's handle. Raises ValueError, and NIXL's errors."""
        name, where = self._peer(order.peer)
        size = order.size
        for offsets, limit in ((order.ours, self._memory.nbytes), (order.theirs, where.size)):
            if min(offsets) < 0 or max(offsets) + size > limit:
                raise ValueError(f"pieces of {size} bytes are asked for outside of a memory of {limit}")
        ours = [(self._base + offset, size, 0) for offset in order.ours]
        theirs = [(where.base + offset, size, 0) for offset in order.theirs]
        descriptors = (self._agent.get_xfer_descs(each, mem_type="DRAM") for each in (ours, theirs))
        return self._agent.initialize_xfer("READ", *descriptors, name, backends=["UCX"])

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
        for number, handle in list(self._reads.items()):
            try:
                self._tell(number, handle, self._agent.check_xfer_state(handle))
            except Exception as error:
                del self._reads[number]
                self._say(Done(number, error=_in_words(error)))
        if time.perf_counter() - began_s > BUSY_S:
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def _tell(self, number: int, handle: Any, state: str) -> None:
        """Take note of how a read stands."""
        if state == "PROC":
            self._reads[number] = handle
            return
        self._reads.pop(number, None)
        if state == "DONE":
            self._agent.release_xfer_handle(handle)
            self._say(Done(number))
        else:  # its handle is not touched again: nobody knows what still moves
            self._say(Done(number, error=f"the transfer's state is {state}"))

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
    fd, parent, path, size = arguments
    die_with_parent(int(parent))
    with socket.socket(fileno=int(fd)) as sock:
        nixl, version = _package()
        _Agent(sock, nixl, version, path, int(size)).run()
    os._exit(0)  # the transport's own way out can wait for peers


if __name__ == "__main__":
    main(sys.argv[1:])
