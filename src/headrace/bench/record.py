"""What is written down about one request, and the latencies that follow from it.

Times are seconds of the run's clock. A *chunk* is what arrived at once: an event of a stream, or the tokens
of one engine step. Servers may put several tokens into one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headrace.bench.errors import Failure


class Counted(enum.StrEnum):
    """Where the number of tokens in each chunk comes from."""

    IDS = "ids"  # the server sent the token ids
    USAGE = "usage"  # the server sent a running count
    TEXT = "text"  # the total is the server's; it is shared out by the length of the text
    CHUNKS = "chunks"  # the server says nothing: each chunk counts as one


@dataclass(slots=True)
class Record:
    """One request. The target fills in what the server did, the run the rest."""

    number: int
    session: int
    turn: int
    due_s: float
    """When the schedule, or the turn before and its think time, says it should be sent."""
    ready_s: float
    """When it was both due and not held back by the concurrency limit."""
    asked_tokens: int | None = None
    sent_s: float | None = None
    first_byte_s: float | None = None
    ended_s: float | None = None
    times: list[float] = field(default_factory=list)
    """When each chunk with tokens arrived."""
    sizes: list[int] = field(default_factory=list)
    """Tokens in each of those chunks."""
    counted: Counted = Counted.TEXT
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    finish_reason: str | None = None
    failure: Failure | None = None

    @property
    def completed(self) -> bool:
        return self.ended_s is not None and self.failure is None

    @property
    def lag_s(self) -> float | None:
        """How much later than it should have it was sent: the generator's own fault."""
        return None if self.sent_s is None else self.sent_s - self.ready_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from when the request was handed to the socket."""
        return None if self.sent_s is None or not self.times else self.times[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk; None when there was nothing after it.

        With one token in the first chunk this is the usual (last - first) / (tokens - 1). Tokens that came
        together in the first chunk took their time before it, so they are left out.
        """
        later = self.output_tokens - self.sizes[0] if self.sizes else 0
        return (self.times[-1] - self.times[0]) / later if later > 0 else None

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last token."""
        return None if self.sent_s is None or not self.times else self.times[-1] - self.sent_s

    def itl_s(self) -> NDArray[np.float64]:
        """Inter-token latencies, one for each token after the first chunk: a chunk's gap shared by its
        tokens.
        """
        if len(self.times) < 2:
            return np.empty(0)
        sizes = np.asarray(self.sizes[1:])
        return np.repeat(np.diff(self.times) / sizes, sizes)


def share_out(total: int, weights: list[int]) -> list[int]:
    """Split `total` tokens over chunks: one each, the rest in proportion to `weights` (largest remainders).

    A total smaller than the number of chunks leaves one each: the count is then the chunks'.
    """
    extra = total - len(weights)
    if extra <= 0:
        return [1] * len(weights)
    whole = sum(weights)
    if whole == 0:
        weights, whole = [1] * len(weights), len(weights)
    parts = [divmod(extra * weight, whole) for weight in weights]
    sizes = [1 + quotient for quotient, _ in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: -parts[i][1])
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes
