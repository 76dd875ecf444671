"""What becomes of the prefix cache, as routers are told it: by an engine, through the supervisor's mirror.

In: the block pool's events. Out: what came of them at each step, numbered; and everything at once, for a
router that begins or has missed some. One group of layers is told of, and its blocks are named
without its number.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.engine.blocks import BlockRemoved, KVEvent
from headrace.protocol.messages import KVEvents, KVSnapshot

_GROUP_BYTES = 2


class KVReport:
    """The engine's side: adds up what happens between two reports."""

    def __init__(self, group: int) -> None:
        self._suffix = group.to_bytes(_GROUP_BYTES, "big")
        self._number = 0
        self.evictions = 0
        """Blocks of any group that were removed, in all."""

    def take(self, events: Iterable[KVEvent]) -> KVEvents | None:
        """What came of these events, which follow those of the last call; None: nothing."""
        since = self._number
        there: dict[bytes, bool] = {}
        first: dict[bytes, bool] = {}
        for event in events:
            self._number = event.number
            stored = not isinstance(event, BlockRemoved)
            self.evictions += not stored
            if event.identity.endswith(self._suffix):
                first.setdefault(event.identity, stored)
                there[event.identity] = stored
        if self._number == since:
            return None
        changed = [identity for identity, stored in there.items() if stored == first[identity]]
        return KVEvents(
            since,
            self._number,
            [identity[:-_GROUP_BYTES] for identity in changed if there[identity]],
            [identity[:-_GROUP_BYTES] for identity in changed if not there[identity]],
        )


class KVMirror:
    """The supervisor's side: what the engine's prefix cache has, so that the engine need not be asked."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last event."""
        self._identities: dict[bytes, None] = {}

    def apply(self, events: KVEvents) -> None:
        for identity in events.removed:
            self._identities.pop(identity, None)
        self._identities.update(dict.fromkeys(events.stored))
        self.number = events.number

    def snapshot(self) -> KVSnapshot:
        return KVSnapshot(self.number, list(self._identities))
