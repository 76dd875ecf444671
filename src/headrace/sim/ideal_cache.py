"""One prefix cache for a whole cluster, as no cluster has one: what routing is measured against.

In: the tokens that executors compute. Out: how much of a prompt somebody has computed before. A worker that
finds a block here has it at once, whoever computed it: no transfer, no copy, no worker too busy. So
what a fleet reaches with it, any fleet with as much cache in pieces can at best come near.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from headrace.engine import BlockHasher


class IdealCache:
    """Blocks of full prefixes, the least recently used of which are forgotten."""

    def __init__(self, blocks: int, block_size: int) -> None:
        """`blocks` is how many it holds, of `block_size` positions each."""
        if blocks < 1:
            raise ValueError(f"an ideal cache holds at least one block, got {blocks}")
        self.block_size = block_size
        self._most = blocks
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._hasher = BlockHasher(b"", b"", block_size)

    def __len__(self) -> int:
        return len(self._known)

    def names(self, tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
        """The names of all full blocks of `tokens`, of which those `before` are known to the caller."""
        parent = before[-1] if before else self._hasher.root("")
        return [*before, *self._hasher.chain(parent, tokens[len(before) * self.block_size :])]

    def known(self, names: Sequence[bytes]) -> int:
        """How many positions of a sequence with these blocks were computed before, from its beginning on."""
        count = 0
        for name in names:
            if name not in self._known:
                break
            self._known.move_to_end(name)
            count += 1
        return count * self.block_size

    def add(self, names: Sequence[bytes]) -> None:
        """These blocks were computed."""
        for name in names:
            self._known[name] = None
            self._known.move_to_end(name)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
