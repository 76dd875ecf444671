"""Stop strings over a stream of text.

In: pieces of text as they come. Out: the text that may be sent on. What could still become a stop string is
held back until that is decided, so no part of one is ever sent. The result depends on the text alone, not on
how it was cut into pieces.
"""

from collections import deque
from collections.abc import Iterable

ROOT = 0


class StopChecker:
    """Finds the stop string that is complete first; of several that end there, the longest.

    Text before it is sent, text after it is dropped. With `include_stop` the stop string itself is sent too.
    An Aho-Corasick automaton over characters (Aho and Corasick, 1975): constant time per character, whatever
    the number of stop strings.
    """

    def __init__(self, stops: Iterable[str], include_stop: bool = False) -> None:
        """Raises `ValueError` for an empty stop string, which would stop at once."""
        self._include = include_stop
        self._held = ""
        self._node = ROOT
        self.matched: str | None = None
        """The stop string that ended the text, once one has."""
        self._build(tuple(stops))

    def push(self, text: str) -> str:
        """Take the next piece and return what may be sent. After a match there is nothing more to send."""
        if self.matched is not None:
            return ""
        if self._node == ROOT and self._first.isdisjoint(text):
            return text
        node = self._node
        for at, character in enumerate(text):
            node = self._step(node, character)
            stop = self._stop[node]
            if stop is not None:
                self.matched = stop
                seen = self._held + text[: at + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(stop)]
        self._node = node
        seen = self._held + text
        keep = self._depth[node]
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text: it did not become a stop string after all."""
        text, self._held, self._node = self._held, "", ROOT
        return text

    def _step(self, node: int, character: str) -> int:
        while True:
            after = self._next[node].get(character)
            if after is not None:
                return after
            if node == ROOT:
                return ROOT
            node = self._fallback[node]

    def _build(self, stops: tuple[str, ...]) -> None:
        """A node is a prefix of a stop string; its fallback is the longest proper suffix that is one too."""
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._stop: list[str | None] = [None]
        for stop in stops:
            if not stop:
                raise ValueError("a stop string is empty: it would end every text at once")
            node = ROOT
            for character in stop:
                if character not in self._next[node]:
                    self._next[node][character] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._stop.append(None)
                node = self._next[node][character]
            self._stop[node] = stop
        self._fallback = [ROOT] * len(self._next)
        waiting = deque(self._next[ROOT].values())
        while waiting:
            node = waiting.popleft()
            for character, child in self._next[node].items():
                self._fallback[child] = self._step(self._fallback[node], character)
                if self._stop[child] is None:
                    self._stop[child] = self._stop[self._fallback[child]]
                waiting.append(child)
        self._first = frozenset(self._next[ROOT])
