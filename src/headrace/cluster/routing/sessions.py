"""Which worker each session's last request went to, of one model and for one purpose.

In: choices as they are made. Out: the worker of the last one, while it is there as it was then. Bounded: the
sessions that were silent for longest are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from headrace.cluster.registry import Member

KEPT = 10_000
"""Sessions; a digest and a name of each."""


class Sessions:
    """Of one router."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, tuple[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def last(self, session: str, members: Sequence[Member]) -> int | None:
        """The place among `members` of who had its last request; None: it had none, or that one is not there.

        A worker that was started again since then remembers nothing, and is another one.
        """
        if not session or (known := self._last.get(_digest(session))) is None:
            return None
        for index, member in enumerate(members):
            if (member.worker_id, member.info.generation) == known:
                return index
        return None

    def went(self, session: str, member: Member) -> None:
        """Its request goes to this one now."""
        if not session:
            return
        key = _digest(session)
        self._last[key] = (member.worker_id, member.info.generation)
        self._last.move_to_end(key)
        if len(self._last) > KEPT:
            self._last.popitem(last=False)


def _digest(session: str) -> bytes:
    """A client may give its session a name of any length."""
    return blake2b(session.encode(errors="surrogatepass"), digest_size=16).digest()
