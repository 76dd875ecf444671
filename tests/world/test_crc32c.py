"""The checksum of bulk bytes against its definition, at every length where the code takes another way."""

from __future__ import annotations

import random

import pytest

from headrace import _native


def by_definition(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_published_check_values() -> None:
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert _native.crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, 9, 511, 512, 513, 767, 768, 769, 1025, 12_287, 12_288, 12_300, 26_001]
)
def test_every_length(size: int, wide: bool) -> None:
    data = random.Random(size).randbytes(size)
    expected = by_definition(data)
    assert _native.crc32c(data, wide=wide) == expected
    first = _native.crc32c(data[: size // 3], wide=wide)
    assert _native.crc32c(data[size // 3 :], first, wide=wide) == expected
    assert _native.crc32c(memoryview(b"x" + data)[1:], wide=wide) == expected
