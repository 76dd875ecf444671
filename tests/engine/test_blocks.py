"""The block pool and the KV cache alone, held against models that keep the same books in the simplest way."""

from __future__ import annotations

import pytest
from engine_scenarios import examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.engine import GroupSpec, KVCache
from headrace.engine.blocks import BlockPool, BlockRemoved, BlockStored
from headrace.engine.cache import PrefixHit
from headrace.engine.sequence import Sequence
from headrace.protocol.requests import GenerateRequest, SamplingParams


class PoolMachine(RuleBasedStateMachine):
    """A pool against a dictionary of counts, a dictionary of identities and a list in order of release."""

    @initialize(total=st.integers(1, 8))
    def begin(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.total = total
        self.counts: dict[int, int] = {}
        self.identity: dict[int, bytes] = {}
        self.cached: list[int] = []  # the first goes first
        self.index: dict[bytes, int] = {}
        self.events = 0

    @rule(share=st.floats(0, 1))
    def take(self, share: float) -> None:
        count = round(share * self.pool.available)
        evicted = self.cached[: max(0, count - self.pool.free)]
        taken = self.pool.take(count)
        assert len(set(taken)) == count and not set(taken) & self.counts.keys()
        assert set(taken) & set(self.cached) == set(evicted), "the longest unheld are evicted, after the free"
        for block in evicted:
            self.cached.remove(block)
            del self.identity[block]
        self.counts |= dict.fromkeys(taken, 1)

    @precondition(lambda self: self.counts or self.cached)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.counts, *self.cached]))
        self.pool.hold([block])
        self.counts[block] = self.counts.get(block, 0) + 1
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.counts]))
        self.pool.release([block])
        self.counts[block] -= 1
        if not self.counts[block]:
            del self.counts[block]
            if block in self.identity:
                self.cached.append(block)

    @precondition(lambda self: self.counts)
    @rule(data=st.data(), name=st.binary(max_size=1))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([*self.counts]))
        self.pool.publish(block, name)
        if block not in self.identity and name not in self.identity.values():
            self.identity[block] = name

    @precondition(lambda self: len(self.counts) < self.total)
    @rule(data=st.data())
    def release_once_too_often(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b in range(self.total) if b not in self.counts]))
        with pytest.raises(RuntimeError, match=f"block {block} was released more often"):
            self.pool.release([block])

    @invariant()
    def the_books_agree(self) -> None:
        self.pool.check()
        assert {
            b: self.pool.references(b) for b in range(self.total) if self.pool.references(b)
        } == self.counts
        assert (self.pool.held, self.pool.cached) == (len(self.counts), len(self.cached))
        assert self.pool.free + self.pool.cached + self.pool.held == self.total
        for event in self.pool.take_events():
            self.events += 1
            assert event.number == self.events
            if isinstance(event, BlockStored):
                self.index[event.identity] = event.block
            else:
                assert isinstance(event, BlockRemoved)
                del self.index[event.identity]
        assert self.index == {name: block for block, name in self.identity.items()}
        assert all(self.pool.find(name) == block for name, block in self.index.items())


SIZE = 2


class CacheMachine(RuleBasedStateMachine):
    """A cache against what each block was last filled with, and a search of all prefixes for the longest."""

    @initialize(windows=st.lists(st.none() | st.integers(1, 7), min_size=1, max_size=3))
    def begin(self, windows: list[int | None]) -> None:
        self.groups = tuple(GroupSpec(window) for window in windows)
        self.cache = KVCache(num_blocks=9 * len(windows), block_size=SIZE, groups=self.groups)
        self.live: list[Sequence] = []
        self.content: dict[
            int, tuple[int, str, tuple[int, ...]]
        ] = {}  # block -> (group, salt, tokens so far)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from(["a", "b"]))
    def start(self, tokens: list[int], salt: str) -> None:
        request = GenerateRequest(
            request_id="", prompt=tokens, cache_salt=salt, sampling=SamplingParams(max_tokens=99)
        )
        sequence = Sequence(
            request, 0, (0, 0, 0), 0, self.cache.root(salt), frozenset(), 99, tokens=list(tokens)
        )
        hit = self.cache.match(sequence)
        assert hit.length == self._longest_prefix(salt, tokens)
        for number, (group, table) in enumerate(zip(self.groups, hit.tables, strict=True)):
            first = group.first_visible(hit.length) // SIZE
            for j, block in enumerate(table):
                assert (block >= 0) == (j >= first)
                if block >= 0:
                    assert self.content[block] == (number, salt, tuple(tokens[: (j + 1) * SIZE]))
        self.cache.adopt(sequence, hit)
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 6))
    def compute(self, data: st.DataObject, count: int) -> None:
        """Take blocks, fill them, say so; what windows have passed comes back."""
        sequence = data.draw(st.sampled_from(self.live))
        length = min(sequence.computed + count, len(sequence.tokens), self.cache.room(sequence))
        before = [list(table) for table in sequence.tables]
        added = self.cache.extend(sequence, length)
        assert [old + new for old, new in zip(before, added, strict=True)] == sequence.tables
        for number, table in enumerate(sequence.tables):
            for j in range(sequence.computed // SIZE, -(-length // SIZE)):
                assert self.cache.pool.references(table[j]) == 1, "nobody else holds what is written"
                so_far = tuple(sequence.tokens[: min(length, (j + 1) * SIZE)])
                self.content[table[j]] = (number, sequence.request.cache_salt, so_far)
        sequence.scheduled = sequence.computed = max(length, sequence.computed)
        self.cache.advance(sequence)
        held = sum(block >= 0 for table in sequence.tables for block in table)
        assert held <= self.cache.peak_blocks(sequence.computed, 1)
        for group, table in zip(self.groups, sequence.tables, strict=True):
            first = group.first_visible(sequence.computed) // SIZE
            assert [block >= 0 for block in table] == [j >= first for j in range(len(table))]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        data.draw(st.sampled_from(self.live)).tokens.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.cache.release(sequence)

    @invariant()
    def the_books_agree(self) -> None:
        pool = self.cache.pool
        pool.check()
        named = [block for s in self.live for table in s.tables for block in table if block >= 0]
        assert all(pool.references(block) == named.count(block) for block in range(pool.total))

    def teardown(self) -> None:
        for sequence in getattr(self, "live", ()):
            self.cache.release(sequence)
        if hasattr(self, "cache"):
            assert self.cache.pool.held == 0

    def _longest_prefix(self, salt: str, tokens: list[int]) -> int:
        known = {self.content[block] for block in range(self.cache.pool.total) if self._is_offered(block)}
        for blocks in range((len(tokens) - 1) // SIZE, 0, -1):
            if all(
                (number, salt, tuple(tokens[: (j + 1) * SIZE])) in known
                for number, group in enumerate(self.groups)
                for j in range(group.first_visible(blocks * SIZE) // SIZE, blocks)
            ):
                return blocks * SIZE
        return 0

    def _is_offered(self, block: int) -> bool:
        return self.cache.pool._identity[block] is not None


TestPool = PoolMachine.TestCase
TestPool.settings = examples(120)
TestCache = CacheMachine.TestCase
TestCache.settings = examples(150)


def test_least_and_peak_blocks_bound_what_is_held() -> None:
    """One position at a time needs at least `least_blocks` at some moment, and never more than the peak."""
    for size in (1, 3, 4):
        for windows in ((None,), (1,), (5,), (None, 4), (2, 7)):
            groups = tuple(GroupSpec(window) for window in windows)
            for in_flight in (1, 5):
                cache = KVCache(num_blocks=999, block_size=size, groups=groups)
                sequence = _sequence(cache, 60)
                cache.adopt(sequence, PrefixHit(0, [[] for _ in groups]))
                most = 0
                while sequence.computed < 40:
                    cache.extend(sequence, sequence.computed + in_flight)
                    most = max(most, cache.pool.held)
                    if in_flight == 1:
                        assert most == cache.least_blocks(sequence.computed + 1)
                    assert most <= cache.peak_blocks(sequence.computed + in_flight, in_flight)
                    sequence.computed += 1  # the slowest commit: of many in flight, one position is done
                    cache.advance(sequence)


def test_the_end_of_a_sequence_is_evicted_first() -> None:
    cache = KVCache(num_blocks=4, block_size=SIZE)
    sequence = _sequence(cache, 8)
    cache.adopt(sequence, PrefixHit(0, [[]]))
    cache.extend(sequence, 8)
    sequence.computed = 8
    cache.advance(sequence)
    cache.release(sequence)
    cache.pool.take(2)
    assert cache.match(_sequence(cache, 8)).length == 4, "its beginning is what others may share"


def _sequence(cache: KVCache, length: int) -> Sequence:
    request = GenerateRequest(request_id="", prompt=[7] * length, sampling=SamplingParams(max_tokens=1))
    return Sequence(request, 0, (0, 0, 0), 0, cache.root(""), frozenset(), 99, tokens=[7] * length)


def test_the_key_and_the_fingerprint_part_what_would_be_equal() -> None:
    def identity(**options: bytes) -> bytes:
        return KVCache(num_blocks=1, block_size=1, **options).root("salt")

    roots = [identity(), identity(key=b"k"), identity(fingerprint=b"f"), identity(key=b"k", fingerprint=b"f")]
    assert len(set(roots)) == 4
    assert identity(fingerprint=b"as") != KVCache(num_blocks=1, block_size=1, fingerprint=b"a").root("ssalt")


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    with pytest.raises(ValueError, match="at least one group"):
        KVCache(num_blocks=1, block_size=1, groups=())
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        KVCache(num_blocks=1, block_size=0)
    with pytest.raises(ValueError, match="sliding window"):
        GroupSpec(0)
