"""The KV index against a set of blocks for each worker, walked one after another."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.cluster.approximate_holdings import ApproximateHoldings
from headrace.cluster.kv_index import KVIndex


def identity(number: int) -> bytes:
    """As good as a hash, but its first bytes, which the table uses, meet those of others in every way."""
    return number.to_bytes(4, "little") + bytes(4) + random.Random(number).randbytes(8)


# Some share the 32 bits that say where they belong, some only the place: the table has 1,024 at first.
BLOCKS = [identity(n) for n in (*range(6), *range(1020, 1028), *range(2047, 2050), 4096, 2**31 + 3)]
BLOCKS += [block[:8] + bytes(7) + bytes([n]) for n in range(3) for block in BLOCKS[:3]]

blocks = st.lists(st.sampled_from(BLOCKS), max_size=20)


def leading(held: set[bytes], chain: list[bytes]) -> int:
    for depth, block in enumerate(chain):
        if block not in held:
            return depth
    return len(chain)


class IndexMachine(RuleBasedStateMachine):
    """Members come and go; every answer is that of the sets."""

    @initialize(others=st.sampled_from([0, 61, 62, 63, 64, 127, 300]))
    def begin(self, others: int) -> None:
        self.index = KVIndex()
        self.others = others  # members that hold nothing, before those that do
        self.held: dict[str, set[bytes]] = {}
        self.slots: dict[str, int] = {}
        for number in range(others):
            assert self.index.add_member(f"other {number}") == number

    @rule(name=st.sampled_from("abcdefg"))
    def add(self, name: str) -> None:
        if name in self.slots:
            with pytest.raises(ValueError, match=f"'{name}' already has slot {self.slots[name]}"):
                self.index.add_member(name)
            return
        slot = self.index.add_member(name)
        taken = set(self.slots.values())
        assert slot == min(s for s in range(self.others, self.others + 8) if s not in taken)
        self.slots[name], self.held[name] = slot, set()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def remove_member(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.slots)))
        slot = self.slots.pop(name)
        del self.held[name]
        self.index.remove_member(name)
        assert self.index.name(slot) is None and self.index.slot(name) is None
        with pytest.raises(ValueError, match=f"slot {slot} of the KV index is no member's"):
            self.index.store(slot, BLOCKS)

    @precondition(lambda self: self.slots)
    @rule(
        data=st.data(),
        identities=blocks,
        what=st.sampled_from(["store", "store", "remove", "replace", "clear"]),
    )
    def change(self, data: st.DataObject, identities: list[bytes], what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.slots)))
        slot, held = self.slots[name], self.held[name]
        if what == "store":
            self.index.store(slot, identities)
            held.update(identities)
        elif what == "remove":
            self.index.remove(slot, identities)
            held.difference_update(identities)
        elif what == "replace":
            self.index.replace(slot, identities)
            self.held[name] = set(identities)
        else:
            self.index.clear(slot)
            held.clear()

    @rule(chain=blocks)
    def match(self, chain: list[bytes]) -> None:
        found = self.index.match(chain)
        expected = np.zeros(self.index.slots, int)
        for name, slot in self.slots.items():
            expected[slot] = leading(self.held[name], chain)
        assert found.tolist() == expected.tolist()

    @invariant()
    def counts(self) -> None:
        assert {name: self.index.blocks(slot) for name, slot in self.slots.items()} == {
            name: len(held) for name, held in self.held.items()
        }
        assert len(self.index) == len(set().union(*self.held.values()))
        assert all(self.index.name(slot) == name for name, slot in self.slots.items())


class TestIndex(IndexMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("members", [20, 200])
def test_many_blocks_come_and_go(members: int) -> None:
    """Enough for the table to grow, for chunks to fill and be given back, and for sets to widen midway."""
    rng = random.Random(members)
    index = KVIndex()
    chains = [[rng.randbytes(16) for _ in range(100)] for _ in range(200)]
    held: list[set[bytes]] = []
    for number in range(members):
        slot = index.add_member(f"w{number}")
        held.append(set())
        for chain in rng.sample(chains, 20):
            part = chain[: rng.randint(1, 100)]
            index.store(slot, part)
            held[slot].update(part)
            gone = [block for block in part if rng.random() < 0.02]
            index.remove(slot, gone)
            held[slot].difference_update(gone)

    def check() -> None:
        assert len(index) == len(set().union(*held))
        assert [index.blocks(slot) for slot in range(members)] == [len(blocks) for blocks in held]
        for chain in rng.sample(chains, 20):
            assert index.match(chain).tolist() == [leading(blocks, chain) for blocks in held]

    check()
    full = index.memory_bytes
    for slot in range(members):
        if slot % 3 == 0:
            index.clear(slot)
            held[slot].clear()
        elif slot % 3 == 1:
            held[slot] = {block for chain in rng.sample(chains, 5) for block in chain}
            index.replace(slot, list(held[slot]))
    check()
    for slot in range(members):
        index.clear(slot)
        held[slot].clear()
    check()
    assert index.memory_bytes < full


def test_a_new_member_in_an_old_slot_holds_nothing() -> None:
    index = KVIndex()
    for name in "abc":
        index.store(index.add_member(name), BLOCKS)
    index.remove_member("a")
    index.remove_member("b")
    assert index.match(BLOCKS[:2]).tolist() == [0, 0, 2]
    assert [index.add_member("d"), index.add_member("b"), index.add_member("e")] == [0, 1, 3]
    assert index.match(BLOCKS[:2]).tolist() == [0, 0, 2, 0]
    with pytest.raises(KeyError):
        index.remove_member("a")


def test_an_index_of_nobody_and_a_chain_of_nothing() -> None:
    index = KVIndex()
    assert index.match(BLOCKS).tolist() == [] == index.match([]).tolist()
    index.store(index.add_member("a"), BLOCKS)
    assert index.match([]).tolist() == [0]


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (b"short", ValueError, "identity 1 has 5 bytes, not 16"),
        ("x" * 16, TypeError, "identity 1 is of type str"),
    ],
)
def test_what_is_no_identity_is_refused_and_changes_nothing(
    wrong: bytes, error: type[Exception], words: str
) -> None:
    index = KVIndex()
    slot = index.add_member("a")
    index.store(slot, BLOCKS[:1])
    for change in (index.store, index.remove, index.replace):
        with pytest.raises(error, match=words):
            change(slot, [BLOCKS[2], wrong])
    with pytest.raises(error, match=words):
        index.match([BLOCKS[0], wrong])
    assert index.match(BLOCKS[:3]).tolist() == [1]
    with pytest.raises(ValueError, match="slot 1 of the KV index is no member's"):
        index.store(1, BLOCKS)
    with pytest.raises(ValueError, match="slot -1 of the KV index is no member's"):
        index.clear(-1)


MAX_AGE_S = 10


class HoldingsMachine(RuleBasedStateMachine):
    """Guesses for two members beside a third that sends events, against a list of (block, time) for each."""

    @initialize(most=st.integers(1, 12))
    def begin(self, most: int) -> None:
        self.most, self.now = most, 0.0
        self.index = KVIndex()
        self.holdings = ApproximateHoldings(self.index, max_age_s=MAX_AGE_S)
        for name in "abc":
            self.index.add_member(name)
        self.index.store(2, BLOCKS[:5])
        self.used: list[OrderedDict[bytes, float]] = [OrderedDict(), OrderedDict()]

    @rule(slot=st.integers(0, 1), begin=st.integers(0, 6), length=st.integers(0, 8))
    def sent(self, slot: int, begin: int, length: int) -> None:
        chain = BLOCKS[begin : begin + length]
        self.holdings.sent(slot, chain, self.now, max_blocks=self.most)
        used = self.used[slot]
        for block in reversed(chain):
            used.pop(block, None)
            used[block] = self.now
        while len(used) > self.most:
            used.popitem(last=False)

    @rule(seconds=st.integers(0, 6))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(slot=st.integers(0, 1))
    def forget(self, slot: int) -> None:
        self.holdings.forget(slot)
        self.used[slot].clear()

    @rule(chain=blocks)
    def match(self, chain: list[bytes]) -> None:
        self.holdings.expire(self.now)
        held = [{b for b, at in used.items() if self.now - at < MAX_AGE_S} for used in self.used]
        for begin in range(len(BLOCKS)):
            chain = BLOCKS[begin : begin + 8]
            expected = [leading(blocks, chain) for blocks in (*held, set(BLOCKS[:5]))]
            assert self.index.match(chain).tolist() == expected
        assert [self.index.blocks(slot) for slot in (0, 1)] == [len(blocks) for blocks in held]


class TestHoldings(HoldingsMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_beginning_of_a_prompt_is_believed_longest() -> None:
    index = KVIndex()
    holdings = ApproximateHoldings(index, max_age_s=60)
    slot = index.add_member("a")
    holdings.sent(slot, BLOCKS[:6], 0, max_blocks=4)
    assert index.match(BLOCKS[:6]).tolist() == [4]
    holdings.sent(slot, BLOCKS[10:12], 1, max_blocks=4)
    assert index.match(BLOCKS[:6]).tolist() == [2]
    assert index.match(BLOCKS[10:12]).tolist() == [2]


def test_an_age_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_age_s must be above 0 seconds, got 0"):
        ApproximateHoldings(KVIndex(), max_age_s=0)
