"""Which workers a request may go to at all. Pure functions over what the registry knows.

Among those that may, the router chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.cluster.facts import Fact, Table, table_of
from headrace.cluster.options import SplitPolicy
from headrace.cluster.registry import SUSPECT, UP, Member
from headrace.protocol.requests import GenerateRequest


@dataclass(frozen=True, slots=True)
class Possible:
    """Members, and what is known of them: [members, facts]."""

    members: list[Member]
    facts: Table

    def __bool__(self) -> bool:
        return bool(self.members)

    def those(self, mask: NDArray[np.bool_]) -> Possible:
        """Those for which it is true."""
        if mask.all():
            return self
        return Possible([self.members[i] for i in np.flatnonzero(mask).tolist()], self.facts[mask])

    def without(self, member: Member) -> Possible:
        """All but this one."""
        if member not in self.members:
            return self
        mask = np.ones(len(self.members), dtype=bool)
        mask[self.members.index(member)] = False
        return self.those(mask)


def every(members: Iterable[Member]) -> Possible:
    """All of these, as they are now."""
    listed = list(members)
    return Possible(listed, table_of([member.facts for member in listed]))


def possible_homes(everybody: Possible, samples: int) -> Possible:
    """Workers that decode and have room; suspect ones only where there are no others."""
    facts = everybody.facts
    fit = facts[:, Fact.MOST_SAMPLES] - facts[:, Fact.OPEN_SAMPLES] >= samples
    fit &= (facts[:, Fact.IS_FULL] == 0) & (facts[:, Fact.DECODES] != 0)
    up = fit & (facts[:, Fact.STATE] == UP)
    return everybody.those(up if up.any() else fit & (facts[:, Fact.STATE] == SUSPECT))


def room_of(facts: Table) -> int:
    """How many more samples workers that decode take, together."""
    takes = (facts[:, Fact.STATE] == UP) | (facts[:, Fact.STATE] == SUSPECT)
    takes &= (facts[:, Fact.DECODES] != 0) & (facts[:, Fact.IS_FULL] == 0)
    return int((facts[takes, Fact.MOST_SAMPLES] - facts[takes, Fact.OPEN_SAMPLES]).sum())


def possible_prefills(everybody: Possible, home: Member, policy: SplitPolicy) -> Possible:
    """Workers that may prefill for `home`, those of role prefill first.

    Workers of role both help a worker that only decodes.
    """
    found = all_prefills(everybody.without(home), policy)
    if home.info.role.prefills_for_others and found.facts[:, Fact.DECODES].any():
        return Possible([], found.facts[:0])
    return found


def all_prefills(everybody: Possible, policy: SplitPolicy) -> Possible:
    """Workers that may prefill for any other: those of role prefill; where there are none, of role both."""
    facts = everybody.facts
    fit = (
        (facts[:, Fact.PREFILLS] != 0)
        & (facts[:, Fact.TRANSFERS] != 0)
        & (facts[:, Fact.STATE] == UP)
        & (facts[:, Fact.EXPORTS] < policy.prefill_queue_max)
        & (facts[:, Fact.IS_FULL] == 0)
        & (facts[:, Fact.MOST_SAMPLES] > facts[:, Fact.OPEN_SAMPLES])
    )
    dedicated = fit & (facts[:, Fact.DECODES] == 0)
    return everybody.those(dedicated if dedicated.any() else fit)


def why_whole(request: GenerateRequest, home: Member, uncached_tokens: float, policy: SplitPolicy) -> str:
    """Why a prompt is its home's to compute; empty where so much of it is to be computed that another worker
    should, as far as the gateway knows.

    Log-probabilities of the prompt are a by-product of its prefill, so such a prompt is prefilled where its
    answer comes from.
    """
    if request.sampling.prompt_logprobs is not None:
        return "log-probabilities of the prompt are asked for"
    if uncached_tokens <= policy.prompt_length_threshold:
        return "no more of it is to be computed than prompt_length_threshold"
    return "" if home.info.transfers else "its home fetches no blocks from others"


def why_no_prefill(members: Iterable[Member], home: Member) -> str:
    """Why nobody of these may prefill for `home`."""
    others = [member.info.role for member in members if member is not home]
    helps = any(
        role.prefills_for_others and not (role.decodes and home.info.role.prefills_for_others)
        for role in others
    )
    return "no prefill worker has room" if helps else "no other worker prefills for its home"
