"""What routers are told of a prefix cache: whatever the pool did, the mirror has what the pool has."""

from __future__ import annotations

import random

from headrace.engine import GroupSpec, KVCache
from headrace.engine.blocks import BlockPool
from headrace.worker.kv_report import KVMirror, KVReport

SUFFIX = b"\0\0"


def name(number: int, group: int = 0) -> bytes:
    return number.to_bytes(16, "big") + group.to_bytes(2, "big")


def test_the_mirror_follows_the_pool_through_anything() -> None:
    chance = random.Random(4)
    pool, report, mirror = BlockPool(12), KVReport(0), KVMirror()
    held: list[int] = []
    for _ in range(600):
        for _ in range(chance.randrange(4)):  # some rounds bring nothing
            if held and chance.random() < 0.5:
                pool.release((held.pop(chance.randrange(len(held))),))
            elif pool.available:
                (block,) = pool.take(1)
                pool.publish(block, name(chance.randrange(20), group=chance.randrange(2)))
                held.append(block)
        events = report.take(pool.take_events())
        if events is not None:
            assert events.since == mirror.number
            assert not set(events.stored) & set(events.removed)
            mirror.apply(events)
        there = {identity[:-2] for n in range(20) if pool.find(identity := name(n)) is not None}
        assert set(mirror.snapshot().identities) == there
    assert report.evictions > 100


def test_what_comes_and_goes_between_two_reports_is_not_told() -> None:
    pool, report = BlockPool(1), KVReport(0)
    (block,) = pool.take(1)
    pool.publish(block, name(1))
    pool.release((block,))
    pool.take(1)  # evicts it
    events = report.take(pool.take_events())
    assert events is not None
    assert (events.stored, events.removed, events.number) == ([], [], 2)
    assert report.take(pool.take_events()) is None


def test_the_group_that_is_told_of_sees_all_of_the_context() -> None:
    for groups, told in (((GroupSpec(8), GroupSpec(None)), 1), ((GroupSpec(8),), 0)):
        assert KVCache(num_blocks=1, block_size=1, groups=groups).told_group == told
