"""Sizes of memory as people write them: 512MiB, 2GiB, 1.5 GB, or a plain number of bytes."""

from __future__ import annotations

import re
import reprlib

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
LARGEST = 2**60
"""More than any machine has."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in `text`. KiB, MiB, GiB (or K, M, G) are powers of 1024, KB, MB, GB of 1000."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size > LARGEST:
        raise ValueError(f"{reprlib.repr(text)} is more than {format_size(LARGEST)}; no machine has so much")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes with the binary unit that keeps it short: 1.5 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.7g} TiB"
