"""Which workers a request may go to at all. Pure functions over what the registry knows.

Among those that may, the router chooses.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.cluster.options import SplitPolicy
from headrace.cluster.registry import Member, MemberState
from headrace.protocol.requests import GenerateRequest


def possible_homes(members: Iterable[Member], samples: int) -> list[Member]:
    """Workers that decode and have room; suspect ones only where there are no others."""
    fit = [m for m in members if m.info.role.decodes and m.takes_more and m.room >= samples]
    return [m for m in fit if m.state is not MemberState.SUSPECT] or fit


def possible_prefills(members: Iterable[Member], home: Member, policy: SplitPolicy) -> list[Member]:
    """Workers that may prefill for `home`, those of role prefill first.

    Workers of role both help a worker that only decodes.
    """
    fit = [
        m
        for m in members
        if m is not home
        and m.info.role.prefills_for_others
        and m.info.transfers
        and m.state is MemberState.UP
        and m.exports < policy.prefill_queue_max
        and m.room > 0
    ]
    dedicated = [m for m in fit if not m.info.role.decodes]
    if not dedicated and home.info.role.prefills_for_others:
        return []
    return dedicated or fit


def may_split(request: GenerateRequest, home: Member, uncached_tokens: float, policy: SplitPolicy) -> bool:
    """Whether so much of a prompt is to be computed that another worker should, as far as the gateway knows.

    Log-probabilities of the prompt are a by-product of its prefill, so such a prompt is prefilled where its
    answer comes from.
    """
    return (
        home.info.transfers
        and uncached_tokens > policy.prompt_length_threshold
        and request.sampling.prompt_logprobs is None
    )
