"""What a run sends to: an address (`endpoint`) or an engine in this process (`inprocess`).

In: turns of sessions. Out: records of when what came back, and the answer, for the next turn to build on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.bench.record import Record

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session. Exactly one of `prompt` and `messages` is given."""

    prompt: Sequence[int] | str | None = None
    messages: Sequence[Message] | None = None
    max_tokens: int | None = None
    """Output tokens asked for; None leaves it to the server."""
    think_s: float = 0.0
    """Seconds between the answer before and this request."""
    seed: int | None = None
    """For sampling, where the run samples at all."""


@dataclass(slots=True)
class Answer:
    """What came back. `token_ids` only from targets that tell them."""

    text: str = ""
    token_ids: list[int] | None = None


class Target(ABC):
    """Runs turns. Used on one event loop, any number at a time."""

    name: str
    """Where and what, for the report."""
    sends: bool = True
    """Whether requests leave this process, so that sending can be late; else they count from when they are
    due.
    """
    served_cpu_s: float = 0.0
    """Processor time that serving has taken in this very process, in seconds: not the generator's cost."""

    @abstractmethod
    async def send(self, turn: Turn, record: Record) -> Answer:
        """Run `turn`, fill in `record` as things happen, and return when the answer is complete.

        Raises RequestFailed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back what is held."""
