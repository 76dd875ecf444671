"""What source and target say to each other on a connection of the data plane.

    target ──Want──▶ source                        which blocks, by a ticket's token
    source ──Chunk, bytes, Checksums──▶ target     again and again, as blocks are computed
    target ──Confirm──▶ source                     everything arrived and its checksums agree
    source ──Confirmed──▶ target                   the lease held all the time: the blocks may be used

At any point the source may say `Denied` instead and close. A chunk's bytes follow its message unframed.

A target that can read the source's memory by itself says so, and no bytes come on the stream:

    target ──Want(reads)──▶ source
    source ──Shown──▶ target                       again and again, as blocks are computed: where they lie
    target ──Taken──▶ source                       it has read them
    target ──Confirm──▶ source, and so on          or, when it could not read: Want, for the rest as bytes

The connection is plain and whoever dials in is unknown until it has shown a token, so frames are small.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec

MAX_FRAME_BYTES = 1 << 20
"""Limit on one message, before and after the token was shown."""

BlockNames = list[tuple[int, int, int]]
"""Blocks by (KV group, number of the first, how many)."""


class Want(msgspec.Struct, frozen=True, tag=True):
    token: bytes
    generation: int
    blocks: BlockNames
    """In the order in which they are to come."""
    reads: bool = False
    """Whether the target reads them by itself, and is only to be shown where they are."""
    checked: bool = False
    """Whether what is shown is to come with checksums."""

    def names(self) -> list[tuple[int, int]]:
        """The blocks one by one, as (KV group, number)."""
        return [(group, first + i) for group, first, count in self.blocks for i in range(count)]


class Chunk(msgspec.Struct, frozen=True, tag=True):
    """The next `count` of the wanted blocks follow, as bytes."""

    count: int


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Of each block of the chunk before, as it was sent."""

    values: list[int]


class Shown(msgspec.Struct, frozen=True, tag=True):
    """The next of the wanted blocks may be read at these places of the source's pool."""

    places: list[int]
    places_sum: int
    """`sum_of_places` of them: a place that changes on the way is a block of somebody else."""
    checksums: list[int] = []
    """Of each block, where they were asked for and can be had."""


def sum_of_places(places: Sequence[int]) -> int:
    """A checksum over places."""
    return zlib.crc32(b"".join(place.to_bytes(8, "big") for place in places))


class Taken(msgspec.Struct, frozen=True, tag=True):
    """So many more of the blocks that were shown are read: nothing reads them any more."""

    count: int


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """All wanted blocks arrived whole."""


class Confirmed(msgspec.Struct, frozen=True, tag=True):
    """The blocks were untouched from the first byte to the last. The source gives them up now."""


class Denied(msgspec.Struct, frozen=True, tag=True):
    """Nothing more comes, for this reason; what came may not be used."""

    reason: str


FromTarget = Want | Taken | Confirm
FromSource = Chunk | Checksums | Shown | Confirmed | Denied
