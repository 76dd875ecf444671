"""What source and target say to each other on a connection of the data plane.

    target ──Want──▶ source                        which blocks, by a ticket's token
    source ──Chunk, bytes, Checksums──▶ target     again and again, as blocks are computed
    target ──Confirm──▶ source                     everything arrived and its checksums agree
    source ──Confirmed──▶ target                   the lease held all the time: the blocks may be used

At any point the source may say `Denied` instead and close. A chunk's bytes follow its message unframed.

The connection is plain and whoever dials in is unknown until it has shown a token, so frames are small.
"""

from __future__ import annotations

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


class Chunk(msgspec.Struct, frozen=True, tag=True):
    """The next `count` of the wanted blocks follow, as bytes."""

    count: int


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Of each block of the chunk before, as it was sent."""

    values: list[int]


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """All wanted blocks arrived whole."""


class Confirmed(msgspec.Struct, frozen=True, tag=True):
    """The blocks were untouched from the first byte to the last. The source gives them up now."""


class Denied(msgspec.Struct, frozen=True, tag=True):
    """Nothing more comes, for this reason; what came may not be used."""

    reason: str


FromTarget = Want | Confirm
FromSource = Chunk | Checksums | Confirmed | Denied
