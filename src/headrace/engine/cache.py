"""The KV cache of sequences: groups of layers over one pool of blocks, and the prefix cache between them.

Layers that see the same keys form a *group*: all of the context, or a sliding window of it. Groups share
one pool, since a block holds `block_size` positions of equally many layers in each. A sequence has one
block table per group.

A full block's identity (`identity.py`) stands for everything that shaped its content. Two sequences with one
identity may read one block, so a prefix hit is a look-up, and what a tenant's salt separates can never meet.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from headrace.engine.blocks import BlockPool
from headrace.engine.identity import BlockHasher
from headrace.engine.sequence import Sequence
from headrace.protocol.handoff import BlockSpan
from headrace.protocol.messages import BlockNames


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers that see the same keys. A query at position p sees (p - window, p], or [0, p] for None."""

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a sliding window must cover at least 1 position, got {self.window}")

    def first_visible(self, position: int) -> int:
        """The oldest position that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Blocks that already hold the first `length` positions, as tables per group (-1: not needed)."""

    length: int
    tables: list[list[int]]


class KVCache:
    """Block tables of sequences over a `BlockPool`, with automatic prefix caching."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        groups: ReadOnlyList[GroupSpec] = (GroupSpec(),),
        fingerprint: bytes = b"",
        key: bytes = b"",
    ) -> None:
        """`fingerprint` names weights, precision and layout; `key` (at most 64 bytes) keys the hashes."""
        if not groups:
            raise ValueError("a KV cache needs at least one group of layers")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.groups = tuple(groups)
        self._windowed = [number for number, group in enumerate(self.groups) if group.window is not None]
        self.no_blocks: tuple[list[int], ...] = tuple([] for _ in self.groups)
        """What `extend` gives to whom it need not give anything."""
        self.hasher = BlockHasher(key, fingerprint, block_size)

    @property
    def told_group(self) -> int:
        """The group whose blocks routers are told of: the first that sees all of the context, if any."""
        return next((number for number, group in enumerate(self.groups) if group.window is None), 0)

    @property
    def block_names(self) -> BlockNames:
        """What others need, beside the key, to name the blocks of a prompt as this cache does."""
        return BlockNames(self.hasher.fingerprint, self.told_group, self.hasher.key_check)

    def root(self, salt: str) -> bytes:
        """Where the chain of identities of a tenant's blocks starts."""
        return self.hasher.root(salt)

    def peak_blocks(self, length: int, in_flight: int) -> int:
        """The most blocks one sequence of `length` positions holds at once.

        `in_flight` is how many positions can be scheduled before a window's old blocks come back.
        """
        size = self.block_size
        total = 0
        for group in self.groups:
            blocks = -(-length // size)
            if group.window is not None:
                positions = group.window - 1 + in_flight  # they may begin and end inside a block
                blocks = min(blocks, (positions + size - 2) // size + 1)
            total += blocks
        return total

    def least_blocks(self, length: int) -> int:
        """The fewest blocks with which a sequence can reach `length` positions, one at a time.

        How many blocks a window touches depends on where in a block it ends; a block further on, a
        position needs at least as many. So the last `block_size` positions decide.
        """
        size = self.block_size
        if all(group.window is None for group in self.groups):
            return len(self.groups) * -(-length // size)
        return max(
            sum(position // size - group.first_visible(position) // size + 1 for group in self.groups)
            for position in range(max(0, length - size), length)
        )

    def identities(self, root: bytes, tokens: ReadOnlyList[int]) -> list[bytes]:
        """The chained hash of each block that `tokens` touch, the last one perhaps of a part of a block."""
        return self.hasher.chain_with_rest(root, tokens)

    def first_needed(self, length: int) -> list[int]:
        """Per group, the first block that a query at position `length` sees."""
        return [group.first_visible(length) // self.block_size for group in self.groups]

    def visible_blocks(self, length: int) -> int:
        """Blocks below position `length` that a query there sees, over all groups."""
        return sum(-(-length // self.block_size) - first for first in self.first_needed(length))

    def trim(self, hit: PrefixHit, length: int) -> PrefixHit:
        """A hit without the blocks that a query at position `length` does not see."""
        tables = [
            [-1] * min(first, len(table)) + table[first:]
            for first, table in zip(self.first_needed(length), hit.tables, strict=True)
        ]
        return PrefixHit(hit.length, tables)

    def reserve(self, sequence: Sequence, hit: PrefixHit, length: int) -> list[BlockSpan]:
        """Give a sequence all blocks that a query at position `length` sees: the trimmed `hit`, and new ones,
        which are returned, to be filled from elsewhere. The caller has checked that there are enough."""
        self.adopt(sequence, hit)
        end = -(-length // self.block_size)
        fill = []
        for number, (first, table) in enumerate(zip(self.first_needed(length), sequence.tables, strict=True)):
            table.extend([-1] * (min(first, end) - len(table)))
            if len(table) < end:
                fill.append(BlockSpan(number, len(table), self.pool.take(end - len(table))))
                table.extend(fill[-1].blocks)
        return fill

    def match(self, sequence: Sequence) -> PrefixHit:
        """The longest cached prefix that every group can continue from; holds nothing yet.

        At least one position is left to compute, since the last one's logits are wanted.
        """
        size = self.block_size
        most = (len(sequence.tokens) - 1) // size
        self._hash_up_to(sequence, most)
        found: list[list[int]] = []
        for number, group in enumerate(self.groups):
            row = []
            for j in range(most):
                block = self.pool.find(_identity(sequence.hashes[j], number))
                if block is None:
                    if group.window is None:
                        break
                    block = -1
                row.append(block)
            if group.window is None:
                most = min(most, len(row))
            found.append(row)
        while (hole := self._first_hole(found, most)) is not None:
            most = hole
        tables = []
        for group, row in zip(self.groups, found, strict=True):
            first = group.first_visible(most * size) // size
            tables.append([-1] * min(first, most) + row[first:most])
        return PrefixHit(most * size, tables)

    def adopt(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Give a sequence without blocks those of `hit`."""
        for table in hit.tables:
            self.pool.hold(block for block in table if block >= 0)
        sequence.tables = [list(table) for table in hit.tables]
        sequence.scheduled = sequence.computed = hit.length
        sequence.published = hit.length // self.block_size

    def covers(self, sequence: Sequence, length: int) -> bool:
        """Whether a sequence has the blocks for positions below `length`."""
        return length <= len(sequence.tables[0]) * self.block_size  # tables grow together

    def room(self, sequence: Sequence) -> int:
        """The length that a sequence can reach with its blocks and those there are to take."""
        more = self.pool.available // len(self.groups)
        return (len(sequence.tables[0]) + more) * self.block_size

    def extend(self, sequence: Sequence, length: int) -> tuple[list[int], ...]:
        """Make room for positions below `length`, at most `room`: the new blocks of each group."""
        count = -(-length // self.block_size) - len(sequence.tables[0])
        if count <= 0:
            return self.no_blocks
        added = []
        for table in sequence.tables:
            new = self.pool.take(count)
            table.extend(new)
            added.append(new)
        return tuple(added)

    def advance(self, sequence: Sequence) -> None:
        """Let others find the blocks that `computed` has filled; give back what windows have passed."""
        full = sequence.computed // self.block_size
        if full > sequence.published:
            self._hash_up_to(sequence, full)
            for j in range(sequence.published, full):
                for number, table in enumerate(sequence.tables):
                    if table[j] >= 0:
                        self.pool.publish(table[j], _identity(sequence.hashes[j], number))
            sequence.published = full
        for number in self._windowed:
            table = sequence.tables[number]
            j = self.groups[number].first_visible(sequence.computed) // self.block_size - 1
            while j >= 0 and table[j] >= 0:
                self.pool.release((table[j],))
                table[j] = -1
                j -= 1

    def release(self, sequence: Sequence) -> None:
        """Give everything back, the end of the sequence to be evicted first."""
        for table in sequence.tables:
            self.pool.release(block for block in reversed(table) if block >= 0)
        sequence.tables = []
        sequence.scheduled = sequence.computed = sequence.published = 0

    def _first_hole(self, found: list[list[int]], blocks: int) -> int | None:
        """The first block that some group needs to continue after `blocks` of them, and that is not there.

        No longer prefix, up to `blocks`, can do without it either.
        """
        for group, row in zip(self.groups, found, strict=True):
            for j in range(group.first_visible(blocks * self.block_size) // self.block_size, blocks):
                if row[j] < 0:
                    return j
        return None

    def _hash_up_to(self, sequence: Sequence, blocks: int) -> None:
        size, hashes = self.block_size, sequence.hashes
        if len(hashes) < blocks:
            parent = hashes[-1] if hashes else sequence.root
            tokens = sequence.tokens[len(hashes) * size : blocks * size]
            hashes += self.hasher.chain_with_rest(parent, tokens)


def _identity(chained: bytes, group: int) -> bytes:
    return chained + group.to_bytes(2, "big")
