"""Chooses: which worker decodes a request, and which one prefills for it.

In: workers that may take it, what is known of them, and a policy. Out: the chosen one, and the decision with
everything that led to it. A policy of the user's own that fails costs nobody a request: the least loaded
worker is chosen instead, and the decision says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from headrace.cluster.facts import Column
from headrace.cluster.holdings import Holdings, Prompt
from headrace.cluster.options import RoutingOptions
from headrace.cluster.placement import Possible
from headrace.cluster.registry import Member
from headrace.cluster.routing.candidates import Candidates, Wish
from headrace.cluster.routing.decision import Decision
from headrace.cluster.routing.own import in_words
from headrace.cluster.routing.policies import policy_of
from headrace.cluster.routing.policy import Terms
from headrace.cluster.routing.sessions import Sessions
from headrace.world import Chance

PURPOSES = ("decode", "prefill")


class Router:
    """For one gateway."""

    def __init__(
        self,
        options: RoutingOptions,
        holdings: Holdings,
        chance: Chance,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Raises ValueError for a policy that there is not. `report` gets lines for people."""
        self._name = options.policy
        self._policies = {purpose: policy_of(options, chance) for purpose in PURPOSES}
        """One each: what takes turns takes them among those that decode, and among those that prefill."""
        self._sessions = {purpose: Sessions() for purpose in PURPOSES}
        self._holdings = holdings
        self._report = report
        self._has_failed = False

    def candidates(self, possible: Possible, wish: Wish, prompt: Prompt, now: float) -> Candidates:
        """What is known of those that could take a request."""
        return Candidates(possible, wish, self._holdings.cached_tokens(prompt, possible.facts, now), now)

    def choose(self, among: Candidates, *, purpose: str) -> tuple[Member, Decision]:
        """One of at least one member, for one of the `PURPOSES`."""
        members, sessions = among.members, self._sessions[purpose]
        among.last = sessions.last(among.wish.session, members)
        alone = len(members) == 1
        rule = "the only one with room" if alone else f"lowest score of policy {self._name}"
        try:
            terms = _checked(self._policies[purpose].terms(among), len(members))
            scores = _scores(terms, len(members))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a policy of the user's own may do anything; the request must go on
            rule = f"policy {self._name} failed with {in_words(error)}; the least loaded"
            if not self._has_failed:
                self._has_failed = True
                self._report(f"routing {rule} worker is chosen instead, here and whenever it fails")
            terms = {"load": among.load}
            scores = among.load
        best = _lowest(scores, among)
        sessions.went(among.wish.session, members[best])
        decision = Decision(
            at_s=among.now,
            purpose=purpose,
            policy=self._name,
            rule=rule,
            workers=tuple([member.worker_id for member in members]),
            chosen=best,
            scores=scores,
            terms=terms,
            cached_tokens=among.cached_tokens,
            queued_tokens=among.queued_tokens,
            ttft_s=among.ttft_s,
            tpot_s=among.tpot_s,
            age_s=among.age_s,
            heard_s_ago=among.heard_s_ago,
        )
        return members[best], decision


def _checked(terms: Terms, count: int) -> Terms:
    """A policy's terms as they are now, whatever it does to its own later. Raises ValueError for what could
    not be added up, or not be told to anybody."""
    if not terms:
        raise ValueError("it gives no terms")
    found: dict[str, Column] = {}
    for name, given in terms.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"the name of a term is {name!r}, and no text that can be printed")
        column = np.array(given, dtype=np.float64)
        if column.shape != (count,):
            raise ValueError(f"its term {name!r} is of shape {column.shape}, not ({count},)")
        found[name] = column
    return found


def _scores(terms: Terms, count: int) -> Column:
    """The sums. Raises ValueError for columns that are no numbers, or that choose nobody."""
    scores: Column = np.zeros(count)
    for column in terms.values():
        scores += column
    lowest = float(scores.min())  # NaN if any is
    if math.isnan(lowest):
        raise ValueError("its scores are not all numbers")
    if lowest == math.inf:
        raise ValueError("its scores rule everybody out")
    return scores


def _lowest(scores: Column, among: Candidates) -> int:
    """The index of the lowest score; among equals of the least loaded, then by name."""
    best = int(scores.argmin())
    equal = np.flatnonzero(scores == scores[best]).tolist()
    if len(equal) == 1:
        return best
    load = among.load.tolist()
    return min(equal, key=lambda i: (load[i], among.members[i].worker_id))
