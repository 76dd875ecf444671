"""How long either side of a transfer waits for the other. In seconds."""

from __future__ import annotations

ANSWER_TIMEOUT_S = 10.0
"""How long a target may take to say what it wants, or to confirm."""

STALL_TIMEOUT_S = 10.0
"""How long an answer that needs no computation may take to come; a chunk has time for its bytes as well."""

SLOWEST_BYTES_PER_S = 10e6
"""What comes more slowly than this is given up: computing it is quicker."""


def chunk_time_s(nbytes: int) -> float:
    """How long so many bytes may take."""
    return STALL_TIMEOUT_S + nbytes / SLOWEST_BYTES_PER_S
