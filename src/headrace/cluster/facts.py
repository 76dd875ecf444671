"""What is known of a worker as a row of numbers, so that a choice among hundreds is a few array operations.

A member writes its own row whenever something changes; routing stacks the rows of all. Times in seconds,
lengths in tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]
"""[facts]"""
Table = NDArray[np.float64]
"""[workers, facts]"""
Column = NDArray[np.float64]
"""[workers]"""


class Fact(enum.IntEnum):
    """Places in a row."""

    DECODES = 0
    PREFILLS = enum.auto()
    """For others."""
    TRANSFERS = enum.auto()
    STATE = enum.auto()
    """The number of a `MemberState`."""
    MOST_SAMPLES = enum.auto()
    """That run and wait there."""
    OPEN_SAMPLES = enum.auto()
    IS_FULL = enum.auto()
    EXPORTS = enum.auto()
    ROWS = enum.auto()
    """Sequences that run at once."""
    BUDGET = enum.auto()
    """Tokens of a step."""
    QUEUED = enum.auto()
    """Prompt tokens to compute, as it said last."""
    UNSEEN = enum.auto()
    """Those on their way to it."""
    HELD_SHARE = enum.auto()
    """Of its KV blocks."""
    RUNNING = enum.auto()
    HELD = enum.auto()
    """Positions in its KV cache."""
    BASE_S = enum.auto()
    PER_TOKEN_S = enum.auto()
    PER_HELD_S = enum.auto()
    PREFILLED = enum.auto()
    """Prompt tokens of a step, lately."""
    DECODE_S = enum.auto()
    """How long a sequence decodes."""
    BUSY = enum.auto()
    """Share of time in steps, at BUSY_AT_S."""
    BUSY_AT_S = enum.auto()
    TOLD_S = enum.auto()
    """When it spoke of its load last, with its last step."""
    HEARD_S = enum.auto()
    """When it said anything last, as that it is there."""
    CACHE = enum.auto()
    """Its slot in the KV index; -1: nothing is known of its cache."""
    PREFIX_QUERIES = enum.auto()
    """Tokens that its prefix cache was asked for, and those that it had."""
    PREFIX_HITS = enum.auto()
    BLOCK = enum.auto()
    """Positions of a KV block."""
    HASHER = enum.auto()
    """The number of how it names its blocks."""


def new_row() -> Row:
    """Of a worker of which nothing is known."""
    row = np.zeros(len(Fact))
    row[Fact.TOLD_S], row[Fact.CACHE] = -np.inf, -1
    return row


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, one below the other."""
    return np.concatenate(rows).reshape(len(rows), len(Fact)) if rows else np.zeros((0, len(Fact)))
