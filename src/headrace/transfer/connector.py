"""Which way blocks come to a worker: by an agent that reads the source's memory, or as bytes on a stream.

In: this worker's agent, if it has one, and tickets. Out: for each ticket whether to read, and a line for
people when that is said for the first time. Reading needs an agent at both ends, and that the two reach each
other, which only trying shows: a source that could not be read is not tried again until its agent is another
one.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.protocol.handoff import Ticket
from headrace.world import MemoryAgent

MAX_REMEMBERED = 1024
"""Sources of which is known that they cannot be read, or what was said."""


class Connector:
    """For one life of an engine."""

    def __init__(
        self,
        agent: MemoryAgent | None = None,
        *,
        checked: bool = False,
        lacks: str = "",
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`checked`: what was read is compared by checksums. `lacks` says why there is no agent; nothing is
        said where it is empty, as nobody asked for one."""
        self.agent = agent
        self.checked = checked
        self._lacks = lacks
        self._report = report
        self._unread: dict[bytes, str] = {}
        self._said: dict[str, str] = {}

    def reads(self, ticket: Ticket) -> MemoryAgent | None:
        """What to read this ticket's blocks with; None where they come as bytes."""
        why = self._lacks
        if self.agent is not None:
            why = self._unread.get(ticket.memory, "") if ticket.memory else "it has no NIXL agent"
            if not why and not self.agent.address:
                why = "the NIXL agent here was lost and starts again"
        if self.agent is None or why:
            self._say(ticket, f"over TCP: {why}" if why else "")
            return None
        return self.agent

    def was_read(self, ticket: Ticket) -> None:
        """Blocks were read."""
        self._say(ticket, "over NIXL")

    def failed(self, ticket: Ticket, why: str) -> None:
        """Blocks could not be read."""
        if len(self._unread) >= MAX_REMEMBERED:
            self._unread.clear()
        self._unread[ticket.memory] = why
        self._say(ticket, f"over TCP: {why}")

    def _say(self, ticket: Ticket, way: str) -> None:
        if way and self._said.get(ticket.worker_id) != way:
            if len(self._said) >= MAX_REMEMBERED:
                self._said.clear()
            self._said[ticket.worker_id] = way
            self._report(f"KV blocks from {ticket.worker_id} come {way}")
