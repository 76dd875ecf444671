"""Named random streams: every component draws from its own, so that one cannot shift another's numbers.

A stream is fixed by (seed, name). In a simulation the seed is the run's; in production it comes from the
operating system. Not for secrets: keys and nonces come from `secrets`.
"""

from __future__ import annotations

import hashlib
import os
import random

Chance = random.Random
"""One stream of random numbers."""


class RandomStreams:
    """Independent generators by name; the same name gives the same generator, which goes on where it was."""

    def __init__(self, seed: int | bytes) -> None:
        """`seed`: any integer, or bytes."""
        self._key = (
            _digest(b"bytes", seed) if isinstance(seed, bytes) else _digest(b"int", str(seed).encode())
        )
        self._streams: dict[str, random.Random] = {}

    @classmethod
    def from_os(cls) -> RandomStreams:
        """Streams that differ in every process."""
        return cls(os.urandom(32))

    def stream(self, name: str) -> random.Random:
        """The generator called `name`."""
        generator = self._streams.get(name)
        if generator is None:
            generator = random.Random(int.from_bytes(_digest(self._key, b"stream", name.encode()), "big"))
            self._streams[name] = generator
        return generator

    def scope(self, name: str) -> RandomStreams:
        """A family of streams of its own, for one host or one part: its "router" is nobody else's."""
        return RandomStreams(_digest(self._key, b"scope", name.encode()))


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
