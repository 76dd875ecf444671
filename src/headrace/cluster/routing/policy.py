"""What a routing policy is: one method that says what each candidate would cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from headrace.cluster.facts import Column
from headrace.cluster.options import RoutingOptions
from headrace.cluster.routing.candidates import Candidates
from headrace.world import Chance

Terms = Mapping[str, Column]
"""Named parts of a score, [candidates] each. The lowest sum wins; among equals the least loaded."""


class Policy(ABC):
    """Subclass it in a module of your own and name it in the configuration as `module:Class`."""

    def __init__(self, options: RoutingOptions, chance: Chance) -> None:
        """`chance` is the policy's own stream of random numbers: a simulation can be lived again."""
        self.options = options
        self.chance = chance

    @abstractmethod
    def terms(self, among: Candidates) -> Terms:
        """What each candidate would cost this request (`among.wish`). At least one candidate is there."""
