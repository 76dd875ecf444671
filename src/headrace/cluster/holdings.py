"""Which leading blocks of a prompt each worker's prefix cache holds.

In: what workers tell of their caches, in numbered events; of one that tells nothing that can be read here,
what was sent there. Out: for a prompt, the cached tokens of each member. It must not know routing.

    KVWanted ──▶ snapshot at event n ──▶ events n→m, m→k, … ──a gap, or a heartbeat ahead──▶ KVWanted

The names of blocks are keyed hashes, so only who has the cluster's key can tell which block a prompt needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.cluster.approximate_holdings import ApproximateHoldings
from headrace.cluster.facts import Column, Fact, Table
from headrace.cluster.kv_index import KVIndex
from headrace.cluster.registry import Member
from headrace.engine.identity import BlockHasher
from headrace.protocol.messages import KVEvents, KVSnapshot

GUESS_AGE_S = 600.0
"""What was sent to a worker that tells nothing is believed to be cached there for so long."""


@dataclass(slots=True, eq=False)
class Prompt:
    """The tokens of one attempt, and the names of their blocks, computed once."""

    tokens: Sequence[int]
    salt: str
    chains: dict[BlockHasher, list[bytes]] = field(default_factory=dict)

    def chain(self, hasher: BlockHasher) -> list[bytes]:
        """The names of all full blocks but the last token's: that one is always computed."""
        chain = self.chains.get(hasher)
        if chain is None:
            most = (len(self.tokens) - 1) // hasher.block_size * hasher.block_size
            chain = hasher.chain(hasher.root(self.salt), self.tokens[:most])
            self.chains[hasher] = chain
        return chain


@dataclass(slots=True, eq=False)
class _Known:
    """A member whose cache is followed, or guessed."""

    slot: int
    hasher: BlockHasher
    is_told: bool
    """Whether the member tells of its cache itself."""
    number: int | None = None
    """The event at which the index stands; None: it waits for a snapshot."""


class Holdings:
    """Of all members of one gateway."""

    def __init__(self, key: bytes, guess_key: bytes) -> None:
        """`key` is the cluster's, empty where the gateway has none; `guess_key` names what is guessed."""
        self._key = key
        self._guess_key = guess_key
        self._index = KVIndex()
        self._guesses = ApproximateHoldings(self._index, max_age_s=GUESS_AGE_S)
        self._known: dict[str, _Known] = {}
        self._hashers: list[BlockHasher] = []
        self._numbers: dict[tuple[bytes, bytes, int], int] = {}

    def joined(self, member: Member) -> bool:
        """A member is there, with a cache that is not known; returns whether it is to be asked for it."""
        self.lost(member)
        engine, name = member.info.engine, member.worker_id
        if not engine.prefix_caching:
            return False
        is_told, names = False, engine.block_names
        number = self._number(self._guess_key, b"", engine.block_size)
        if names is not None and self._key:
            told = self._number(self._key, names.fingerprint, engine.block_size)
            if self._hashers[told].key_check == names.key_check:
                number, is_told = told, True
        known = _Known(self._index.add_member(name), self._hashers[number], is_told)
        self._known[name] = known
        member.facts[Fact.CACHE], member.facts[Fact.HASHER] = known.slot, number
        return is_told

    def lost(self, member: Member) -> None:
        """A member is gone, and with it what it held."""
        known = self._known.pop(member.worker_id, None)
        if known is not None:
            self._guesses.forget(known.slot)
            self._index.remove_member(member.worker_id)
            member.facts[Fact.CACHE] = -1

    def snapshot(self, member: Member, snapshot: KVSnapshot) -> None:
        """Everything that a member has."""
        known = self._known.get(member.worker_id)
        if known is not None and known.is_told:
            self._index.replace(known.slot, snapshot.identities)
            known.number = snapshot.number

    def changed(self, member: Member, events: KVEvents) -> bool:
        """Follow a member's events; returns whether a snapshot is wanted, as some were missed."""
        known = self._known.get(member.worker_id)
        if known is None or known.number is None:
            return False  # a snapshot is on its way, and has these
        if events.since != known.number:
            known.number = None
            return True
        self._index.remove(known.slot, events.removed)
        self._index.store(known.slot, events.stored)
        known.number = events.number
        return False

    def stands_at(self, member: Member, number: int) -> bool:
        """A member's last event was this one; returns whether a snapshot is wanted."""
        known = self._known.get(member.worker_id)
        if known is None or known.number is None or known.number == number:
            return False
        known.number = None
        return True

    def sent(self, member: Member, prompt: Prompt, now: float) -> None:
        """A prompt was sent there: where a worker tells nothing, its blocks will be there."""
        known = self._known.get(member.worker_id)
        if known is not None and not known.is_told:
            chain, most = prompt.chain(known.hasher), member.info.engine.num_blocks
            self._guesses.sent(known.slot, chain, now, max_blocks=most)

    def cached_tokens(self, prompt: Prompt, facts: Table, now: float) -> Column:
        """Leading tokens of the prompt that each member holds, as far as is known: [members]."""
        self._guesses.expire(now)
        slots = facts[:, Fact.CACHE].astype(np.int64)
        number = facts[:, Fact.HASHER]
        tokens = np.zeros(len(slots))
        for one in set(number[slots >= 0].tolist()):
            hasher = self._hashers[int(one)]
            mine = (slots >= 0) & (number == one)
            blocks = self._index.match(prompt.chain(hasher))
            tokens[mine] = blocks[slots[mine]] * hasher.block_size
        return tokens

    def is_exact(self, member: Member) -> bool:
        """Whether what is said of a member's cache comes from the member, and is complete."""
        known = self._known.get(member.worker_id)
        return known is not None and known.number is not None

    def _number(self, key: bytes, fingerprint: bytes, block_size: int) -> int:
        """Of the hasher that names blocks like this."""
        name = (key, fingerprint, block_size)
        if name not in self._numbers:
            self._numbers[name] = len(self._hashers)
            self._hashers.append(BlockHasher(key, fingerprint, block_size))
        return self._numbers[name]
