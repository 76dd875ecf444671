"""What a process says to the one in which its NIXL agent lives, and how: frames on a socket between the two.

A frame is a 4-byte big-endian length and that many bytes of msgpack. Offsets and sizes are in bytes. It must
not know NIXL: both sides import this, and only one of them has that.
"""

from __future__ import annotations

import msgspec

PREFIX_BYTES = 4

PACKAGES = ("nixl_cu12", "nixl_cu13")
"""Under which names NIXL can be installed. Which CUDA it was built for is the same to us: `nixl` itself only
picks one of these by importing torch."""


class Read(msgspec.Struct, frozen=True, tag=True):
    """Read `size` bytes at each of `theirs` in the memory at `peer` to `ours` here. Answered by `Done`."""

    number: int
    peer: bytes
    ours: list[int]
    theirs: list[int]
    size: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Read no more of this order. It is answered by its `Done` when nothing of it moves."""

    number: int


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Make progress with what peers read, from now on or no more."""

    on: bool


class Sum(msgspec.Struct, frozen=True, tag=True):
    """Take CRC-32Cs of `size` bytes of our memory at each offset. Answered by `Done`."""

    number: int
    offsets: list[int]
    size: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The agent stands."""

    address: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    """An order is over: well, or with `error`."""

    number: int
    error: str = ""
    quiet: bool = False
    """Whether it is certain, although it failed, that nothing moves."""
    checksums: list[int] = []


class Where(msgspec.Struct, frozen=True):
    """What an agent's address consists of."""

    version: str
    """Of NIXL: what agents tell each other differs between versions."""
    metadata: bytes
    """NIXL's own: name, connection and keys of the registered memory."""
    base: int
    """The memory's first byte as its owner's process numbers it."""
    size: int


ToAgent = Read | Stop | Serve | Sum
FromAgent = Ready | Done

_encoder = msgspec.msgpack.Encoder()


def frame(message: ToAgent | FromAgent) -> bytes:
    """One message as it goes on the socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(PREFIX_BYTES, "big") + body
