"""Which model serves a request, of the name that its client asked for.

In: a name, the session, and which models have workers. Out: a `Choice`. A name that stands for several
versions gives each its share: by chance, or for a session always the same one while it has workers. It must
not know requests, and what it chose holds to a request's end: no text changes its model midway.

    a model's own name ──▶ that model
    a name of several  ──weights, of those that can take it and that somebody serves──▶ a version
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from headrace.cluster.options import AliasOptions, GatewayOptions
from headrace.world import Chance


@dataclass(frozen=True, slots=True)
class Choice:
    """The model that serves, and what it was chosen from."""

    asked: str
    """The name that the client used."""
    model: str
    why: str = ""
    """How a version was drawn, in words; empty where the name is the model's own."""
    smaller: str = ""
    """The model that serves in its place when it is under pressure; empty: none."""
    instead_of: str = ""
    """The model in whose place this one serves."""
    pressure: float = 0.0
    """Under which that one was."""

    def stepped_down(self, pressure: float) -> Choice:
        """The smaller model in place of this one, which is under so much pressure."""
        return replace(self, model=self.smaller, smaller="", instead_of=self.model, pressure=pressure)


class StepDown(Exception):
    """A request that a smaller model is to serve: its text is to be tokenised anew, and submitted for
    `Choice.stepped_down`. Nothing was accepted, refused or counted."""

    def __init__(self, pressure: float) -> None:
        """Under which the model is that was asked for."""
        super().__init__(f"a smaller model is to serve: the pressure is {pressure:.4g}")
        self.pressure = pressure


class Versions:
    """The names that one gateway serves."""

    def __init__(self, options: GatewayOptions, serves: Callable[[str], bool], chance: Chance) -> None:
        """`serves` tells whether a model has workers that decode now."""
        self._aliases = {alias.name: alias for alias in options.aliases}
        self._smaller = {model.name: model.smaller for model in options.models}
        self._serves = serves
        self._chance = chance

    def of(self, name: str) -> Mapping[str, float]:
        """The share of each version of a name, all of them together 1; of a model's own name, the whole."""
        if name not in self._aliases:
            return {name: 1.0}
        versions = self._aliases[name].versions
        most = max(weight for _, weight in versions)  # whose sum may be beyond what a float can be
        total = sum(weight / most for _, weight in versions)
        return {model: weight / most / total for model, weight in versions}

    def choose(self, name: str, session: str = "", *, unfit: Collection[str] = (), why: str = "") -> Choice:
        """The model for one request.

        Versions that are `unfit` for it, as `why` says, are left out where there is another. Where no other
        version has workers, one of them is drawn all the same.
        """
        alias = self._aliases.get(name)
        if alias is None:
            return Choice(name, name, smaller=self._smaller.get(name, ""))
        shares = {model: share for model, share in self.of(name).items() if share > 0}
        fit = {model: share for model, share in shares.items() if model not in unfit} or shares
        there = {model: share for model, share in fit.items() if self._serves(model)} or fit
        if session:
            drawn = max(there, key=lambda model: _rank(there[model], name, model, session))
        else:
            (drawn,) = self._chance.choices([*there], [*there.values()])
        told = f"{alias.name} is {_in_words(there)}: by {'its session' if session else 'chance'}"
        told += _without([model for model in shares if model not in fit], why)
        told += _without([model for model in fit if model not in there], "which no worker serves now")
        return Choice(name, drawn, told, self._smaller_of(alias, drawn))

    def _smaller_of(self, alias: AliasOptions, drawn: str) -> str:
        smaller = alias.smaller or self._smaller.get(drawn, "")
        return "" if smaller == drawn else smaller


def _rank(share: float, name: str, model: str, session: str) -> float:
    """Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): the highest of all versions wins, each
    in proportion to its share, and one that goes moves none of the others' sessions."""
    digest = blake2b(f"{name}\0{model}\0{session}".encode(errors="surrogatepass"), digest_size=8).digest()
    unit = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)  # within 0 and 1, and neither
    return -share / math.log(unit)


def _in_words(there: Mapping[str, float]) -> str:
    total = sum(there.values())
    return ", ".join(f"{model} {share / total:.0%}" for model, share in there.items())


def _without(models: Sequence[str], why: str) -> str:
    return f"; without {', '.join(models)}, {why}" if models else ""
