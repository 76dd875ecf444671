"""Identities of blocks against hashlib's BLAKE2b, block by block, and what they must keep apart."""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import _native
from headrace.engine.identity import IDENTITY_BYTES, BlockHasher

TOKENS = st.integers(0, 2**32 - 1) | st.integers(0, 200_000)


def by_definition(key: bytes, parent: bytes, tokens: list[int], size: int) -> list[bytes]:
    """A chain, the last block perhaps not full."""
    chain = []
    for start in range(0, len(tokens), size):
        block = tokens[start : start + size]
        parent = blake2b(parent + struct.pack(f"<{len(block)}I", *block), digest_size=16, key=key).digest()
        chain.append(parent)
    return chain


@given(
    key=st.binary(max_size=64),
    parent=st.binary(min_size=16, max_size=16),
    size=st.integers(1, 40) | st.integers(1, 1024),
    tokens=st.lists(TOKENS, max_size=300),
    repeat=st.integers(1, 8),
)
def test_chains_are_those_of_hashlib(
    key: bytes, parent: bytes, size: int, tokens: list[int], repeat: int
) -> None:
    tokens = tokens * repeat
    hasher = BlockHasher(key, b"f", size)
    expected = by_definition(key, parent, tokens, size)
    assert hasher.chain_with_rest(parent, tokens) == expected
    assert hasher.chain(parent, tokens) == expected[: len(tokens) // size]


@pytest.mark.parametrize("key", [b"", b"k", bytes(range(64))])
def test_every_length_of_a_message(key: bytes) -> None:
    """Blocks of 1 to 300 tokens cross the hash's own blocks of 128 bytes at every place they can."""
    parent = bytes(range(16))
    for length in range(1, 301):
        tokens = list(range(10**6, 10**6 + length))
        assert BlockHasher(key, b"", length).chain(parent, tokens) == by_definition(
            key, parent, tokens, length
        )


def test_a_value_that_was_written_down() -> None:
    """Identities are compared between processes of one release: what they are is not to drift unseen."""
    hasher = BlockHasher(bytes(range(32)), b"fingerprint", 4)
    root = hasher.root("tenant")
    assert [
        root.hex(),
        *(identity.hex() for identity in hasher.chain_with_rest(root, [1, 2, 3, 4, 2**32 - 1])),
    ] == [
        "2bda62d1513a116b45f8355a8727b792",
        "530d2837f323d475d76f718783e08de4",
        "8443bfc1f39d810d19a81129d58570b4",
    ]


def test_a_chain_goes_on_where_another_ended() -> None:
    hasher = BlockHasher(b"key", b"", 3)
    root, tokens = hasher.root(""), list(range(20))
    whole = hasher.chain(root, tokens)
    assert whole == [*whole[:2], *hasher.chain(whole[1], tokens[6:])]
    assert hasher.chain(root, tokens[:2]) == [] == hasher.chain_with_rest(root, [])


def test_the_key_the_fingerprint_and_the_salt_part_what_would_be_equal() -> None:
    roots = [
        BlockHasher(key, fingerprint, 16).root(salt)
        for key in (b"", b"k")
        for fingerprint in (b"", b"f")
        for salt in ("", "s")
    ]
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {IDENTITY_BYTES}
    assert BlockHasher(b"k", b"as", 16).root("salt") != BlockHasher(b"k", b"a", 16).root("ssalt")
    assert BlockHasher(b"k", b"", 1).chain(roots[0], [7]) != BlockHasher(b"l", b"", 1).chain(roots[0], [7])


def test_the_key_check_is_the_same_only_where_identities_are() -> None:
    made = [
        BlockHasher(key, fingerprint, size).key_check
        for key in (b"", b"k", b"l" * 32)
        for fingerprint in (b"", b"f")
        for size in (16, 32)
    ]
    assert len(set(made)) == len(made)
    assert made[0] == BlockHasher(b"", b"", 16).key_check
    assert all(len(bytes.fromhex(check)) == 8 for check in made)


@pytest.mark.parametrize(
    "tokens", [(1, 2, 3, 4), array("I", [1, 2, 3, 4]), np.array([1, 2, 3, 4]), range(1, 5), [True, 2, 3, 4]]
)
def test_any_sequence_of_integers_will_do(tokens: list[int]) -> None:
    hasher = BlockHasher(b"key", b"", 2)
    assert hasher.chain(bytes(16), tokens) == hasher.chain(bytes(16), [1, 2, 3, 4])


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, -(2**70)])
def test_a_token_out_of_range_is_named(token: int) -> None:
    hasher = BlockHasher(b"key", b"", 2)
    with pytest.raises(ValueError, match=f"token 1 is {token}; token ids are from 0 to 4294967295"):
        hasher.chain(bytes(16), [5, token])
    with pytest.raises(ValueError, match="token 2"):
        hasher.chain_with_rest(bytes(16), [5, 5, token])


def test_what_cannot_be_hashed_is_refused() -> None:
    hasher = BlockHasher(b"key", b"", 1)
    with pytest.raises(TypeError, match="float"):
        hasher.chain(bytes(16), [1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="identity of 16 bytes, not of 3"):
        hasher.chain(b"abc", [1])
    with pytest.raises(ValueError, match="at most 64 bytes, not 65"):
        BlockHasher(bytes(65), b"", 1)
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        BlockHasher(b"", b"", 0)


def test_a_list_that_shrinks_while_it_is_read_is_noticed() -> None:
    tokens: list[object] = [1, 2, 3, 4]

    class Shrinks:
        def __index__(self) -> int:
            tokens.clear()
            return 7

    tokens[0] = Shrinks()
    with pytest.raises(ValueError, match="became shorter"):
        _native.BlockHasher(b"", 2).chain(bytes(16), tokens)  # type: ignore[arg-type]
