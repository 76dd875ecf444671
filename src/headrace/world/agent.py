"""Memory that peers read by themselves, and reading theirs: what KV blocks can move over beside connections.

Two implementations stand behind it, NIXL in a process of its own (`world/nixl.py`) and a simulated one
(`sim/agent.py`), and one conformance suite holds both to the words on this page. Nothing here knows blocks,
leases, or which bytes may be read when.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class AgentUnavailable(Exception):
    """There can be no agent here; the text says why, and what to do."""


class ReadFailed(Exception):
    """What was to be read did not all come; nothing writes into the memory any more. The text says why."""


class MemoryAgent(ABC):
    """One piece of memory that peers' agents read, and into which this one reads theirs."""

    address: bytes
    """What a peer's agent needs for reading here. Whoever has it may read at any time, so it is told to
    members of the cluster and nobody else. Empty while there is nothing to read here: the agent was lost, and
    starts again, with another address."""

    @abstractmethod
    async def read(self, peer: bytes, ours: Sequence[int], theirs: Sequence[int], size: int) -> None:
        """Read pieces of `size` bytes from the memory at the address `peer` into ours.

        Piece i lies at byte theirs[i] there and comes to byte ours[i] here. The peer must be `serving`
        meanwhile. Raises ReadFailed. However it ends, cancelled too, it does so only when nothing writes into
        our memory any more, and within a bound: where no peer says so, this agent is ended and another one
        started, and all that it reads for others fails.
        """

    @abstractmethod
    def serving(self) -> AbstractContextManager[None]:
        """Within the block, what peers read from here makes progress; outside of it, it may stand still."""

    @abstractmethod
    async def checksums(self, offsets: Sequence[int], size: int) -> list[int]:
        """Checksums of our memory, of `size` bytes at each offset, alike at both ends. Raises ReadFailed."""

    @abstractmethod
    async def close(self) -> None:
        """Let nobody read any more, and read nothing. Returns when our memory is left alone. Idempotent."""


class OpenAgent(Protocol):
    """How a world makes agents."""

    def __call__(
        self,
        path: str,
        size: int,
        address: str,
        report: Callable[[str], None],
        /,
        *,
        open_to_network: bool = False,
    ) -> Awaitable[MemoryAgent]:
        """An agent over another process's memory on this host; its peers reach it where the host reaches
        `address`, from other machines only if it may be `open_to_network`. `report` gets lines for people.
        Raises AgentUnavailable.
        """
