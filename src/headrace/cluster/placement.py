"""Which worker a request goes to. Pure functions over what the registry knows."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.cluster.options import SplitPolicy
from headrace.cluster.registry import Member, MemberState
from headrace.protocol.requests import GenerateRequest


def choose_home(members: Iterable[Member], samples: int) -> Member | None:
    """The least loaded worker that decodes and has room; a suspect one only where there is no other."""
    fit = [m for m in members if m.info.role.decodes and m.takes_more and m.room >= samples]
    return min(fit, key=_by_load, default=None)


def choose_prefill(members: Iterable[Member], home: Member, policy: SplitPolicy) -> Member | None:
    """The worker that prefills for `home`, the one with the shortest queue; None: there is none with room.

    Workers of role prefill first; those of role both help a worker that only decodes.
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
        return None
    return min(dedicated or fit, key=lambda m: (m.exports, *_by_load(m)), default=None)


def may_split(request: GenerateRequest, home: Member, policy: SplitPolicy) -> bool:
    """Whether a prompt is long enough to be prefilled elsewhere, as far as the gateway can tell.

    Log-probabilities of the prompt are a by-product of its prefill, so such a prompt is prefilled where its
    answer comes from.
    """
    return (
        home.info.transfers
        and len(request.prompt) > policy.prompt_length_threshold
        and request.sampling.prompt_logprobs is None
    )


def _by_load(member: Member) -> tuple[bool, float, str]:
    return member.state is MemberState.SUSPECT, member.load, member.worker_id
