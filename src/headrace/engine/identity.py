"""Identities of KV blocks: a keyed hash chained over everything that shaped a block's content.

A chain starts at a root, which stands for the model, precision and layout (the fingerprint) and for the
tenant (the salt). Each block's identity is the hash of the identity before it and of its own tokens. So equal
identities are equal prefixes, whoever computed them, and without the key nobody can make one.

Engines name their blocks with it, and a gateway that has the key names those of a prompt before it sends it
anywhere. Knows nothing of where blocks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from headrace import _native

IDENTITY_BYTES = 16


class BlockHasher:
    """Identities under one key, for engines of one fingerprint: BLAKE2b (RFC 7693), 16 bytes each."""

    def __init__(self, key: bytes, fingerprint: bytes, block_size: int) -> None:
        """`key` has at most 64 bytes, `fingerprint` names weights, precision and layout."""
        self._native = _native.BlockHasher(key, block_size)
        self._key = key
        self.fingerprint = fingerprint
        self.block_size = block_size

    def root(self, salt: str) -> bytes:
        """Where the chain of a tenant's blocks starts."""
        header = len(self.fingerprint).to_bytes(4, "big") + self.fingerprint
        return blake2b(header + salt.encode(), digest_size=IDENTITY_BYTES, key=self._key).digest()

    def chain(self, parent: bytes, tokens: Sequence[int]) -> list[bytes]:
        """The identity of each full block of `tokens` after `parent`, an identity or a root.

        Raises ValueError for a token that 32 bits without a sign cannot hold.
        """
        return self._native.chain(parent, tokens)

    def chain_with_rest(self, parent: bytes, tokens: Sequence[int]) -> list[bytes]:
        """As `chain`, and where the last block is not full, that of the tokens it has."""
        return self._native.chain(parent, tokens, True)

    @property
    def key_check(self) -> str:
        """16 hex digits, equal where identities are: for one key, fingerprint and block size. They do not
        tell the key."""
        content = self.block_size.to_bytes(4, "big") + self.fingerprint
        return blake2b(content, digest_size=8, key=self._key, person=b"key check").hexdigest()
