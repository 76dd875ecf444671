"""The policies that can be named in a configuration.

`cost` and `latency` weigh what a request would find at each worker; the others are for comparison, and for
clusters of which less is known.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from headrace.cluster.facts import Column
from headrace.cluster.options import RoutingOptions
from headrace.cluster.routing.candidates import Candidates
from headrace.cluster.routing.own import load_policy
from headrace.cluster.routing.policy import Policy, Terms
from headrace.world import Chance

BUSY = 0.1
"""A worker below this share of its time is no hot spot, however idle the others are."""
EVEN = 1.1
"""Nor is one below so many times the mean."""


class Cost(Policy):
    """Weighted sum of the work that a request brings, the work that is there, and what decodes.

    Work is in full steps of the worker: tokens against `max_num_batched_tokens`. So a worker that holds the
    prompt wins until its queue costs more than computing the prompt elsewhere.
    """

    def terms(self, among: Candidates) -> Terms:
        options, step = self.options, among.step_tokens
        found = {
            "uncached": options.prefix_cache_weight * _counted_uncached(among, options) / step,
            "queue": options.queue_length_weight * among.queued_tokens / step,
            "decode load": options.decode_load_weight * among.decode_load,
        }
        if options.hotspot_prevention:
            found["hot spot"] = _hot(among) * among.wish.prompt_tokens / step
        if options.affinity_weight and among.last is not None:
            found["affinity"] = options.affinity_weight * _only(among, among.last)
        return found


class Latency(Policy):
    """Predicted time to the first token, and to all others of a typical answer."""

    TYPICAL_TOKENS = 128

    def terms(self, among: Candidates) -> Terms:
        tokens = min(among.wish.max_tokens, self.TYPICAL_TOKENS)
        return {"TTFT": among.ttft_s, "TPOT": among.tpot_s * tokens}


class Capacity(Policy):
    """Waiting work against measured speed, for workers that are not equal."""

    def terms(self, among: Candidates) -> Terms:
        return {"time of the queue": (among.queued_tokens + among.load) / among.prefill_tokens_per_s}


class Random(Policy):
    """Any."""

    def terms(self, among: Candidates) -> Terms:
        return {"chance": _only(among, self.chance.randrange(len(among)))}


class RoundRobin(Policy):
    """One after another, by name."""

    _last: str = ""

    def terms(self, among: Candidates) -> Terms:
        names = [member.worker_id for member in among.members]
        later = [name for name in names if name > self._last]
        self._last = min(later or names)
        return {"turn": _only(among, names.index(self._last))}


class LeastLoaded(Policy):
    """The fewest open samples against those that run at once."""

    def terms(self, among: Candidates) -> Terms:
        return {"load": among.load}


class PowerOfTwo(Policy):
    """The less loaded of two drawn at random (Mitzenmacher 2001)."""

    def terms(self, among: Candidates) -> Terms:
        drawn = self.chance.sample(range(len(among)), min(2, len(among)))
        missed = np.full(len(among), np.inf)
        missed[drawn] = 0.0
        return {"not drawn": missed, "load": among.load}


class Prefix(Policy):
    """The most cached prompt tokens, whatever waits there."""

    def terms(self, among: Candidates) -> Terms:
        return {"uncached": among.uncached_tokens}


class Session(Policy):
    """Every request of a session to one worker, chosen by rendezvous hashing (Thaler and Ravishankar 1998).

    A worker that comes or goes moves its own sessions only. A request without one goes to the least loaded.
    """

    def terms(self, among: Candidates) -> Terms:
        if not among.wish.session:
            return {"load": among.load}
        ranks = [_rank(among.wish.session, member.worker_id) for member in among.members]
        return {"other sessions'": _only(among, ranks.index(max(ranks)))}


POLICIES: dict[str, type[Policy]] = {
    "cost": Cost,
    "latency": Latency,
    "capacity": Capacity,
    "random": Random,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "prefix": Prefix,
    "session": Session,
}


def policy_of(options: RoutingOptions, chance: Chance) -> Policy:
    """The policy that `options` name. Raises ValueError, saying what there is, or what is wrong with it."""
    name = options.policy
    if name in POLICIES:
        return POLICIES[name](options, chance)
    if ":" not in name:
        known = ", ".join(POLICIES)
        raise ValueError(f"there is no routing policy {name!r}; there are {known}, or give module:Class")
    return load_policy(options, chance)


def _counted_uncached(among: Candidates, options: RoutingOptions) -> Column:
    """Uncached tokens, where too small a share of the prompt's blocks that is cached does not count."""
    if options.min_cache_hit_ratio <= 0.0:
        return among.uncached_tokens
    least = options.min_cache_hit_ratio * among.cacheable_tokens
    return np.where(among.cached_tokens >= least, among.uncached_tokens, float(among.wish.prompt_tokens))


def _hot(among: Candidates) -> Column:
    """How far above an even share of the work a busy worker is, in tens of percent."""
    busy = among.busy
    mean = float(busy.sum()) / len(busy)
    if mean <= 0.0:
        return busy
    over: Column = np.maximum(busy / mean - EVEN, 0.0) * 10.0 * (busy > BUSY)
    return over


def _only(among: Candidates, index: int) -> Column:
    """0 for one candidate and 1 for all others."""
    column = np.ones(len(among))
    column[index] = 0.0
    return column


def _rank(session: str, worker_id: str) -> bytes:
    return blake2b(f"{session}\0{worker_id}".encode(), digest_size=8).digest()
