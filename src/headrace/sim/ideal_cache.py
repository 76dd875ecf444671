"""One prefix cache for a whole cluster, as no cluster has one: what routing is measured against.

In: the blocks that workers fill. Out: pools that all have them at once, whoever filled them: no transfer, no
copy, no worker too busy. Each pool is as large as all caches of the cluster together, so nothing is
missing in one that such a cache would hold. Workers tell of these blocks as of their own, so the gateway
routes and foresees by them, and their schedulers plan no step for what is there. So what a fleet reaches
with it, any fleet with as much cache in pieces can at best come near.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.engine.blocks import BlockPool


class IdealCache:
    """Of one cluster, from the first of its engines on."""

    def __init__(self) -> None:
        self._pools: list[_SharedPool] = []

    def pool(self, blocks: int) -> BlockPool:
        """The pool of one more engine."""
        pool = _SharedPool(blocks, self._pools)
        self._pools.append(pool)
        return pool


class _SharedPool(BlockPool):
    def __init__(self, total: int, pools: list[_SharedPool]) -> None:
        super().__init__(total)
        self._pools = pools

    def publish(self, block: int, identity: bytes) -> None:
        super().publish(block, identity)
        for pool in self._pools:
            if pool is not self:
                pool._have(identity)

    def release(self, blocks: Iterable[int]) -> None:
        released = list(blocks)
        used = [self._identity[block] for block in released]
        super().release(released)
        for pool in self._pools:
            if pool is not self:
                pool._used(used)

    def _used(self, identities: Iterable[bytes | None]) -> None:
        """Of these, let go last what is cached here: they were used elsewhere."""
        for identity in identities:
            block = None if identity is None else self.find(identity)
            if block is not None and block in self._unheld:
                self._unheld.move_to_end(block)

    def _have(self, identity: bytes) -> None:
        """Hold what another has filled, as if it had been computed here and given back."""
        if self.find(identity) is None and self.available:
            block = self.take(1)
            super().publish(block[0], identity)
            self.release(block)
