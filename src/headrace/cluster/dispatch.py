"""Sends requests to workers: asks the router where to, and keeps account of what is on its way.

In: accepted requests that have no worker, and what workers tell of their caches and steps. Out: attempts
(legs) in the ledger, `Submit`s on channels, and every decision in the request's journey.
"""

from __future__ import annotations

import enum
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from headrace.cluster import prediction
from headrace.cluster.classes import Band, Expectation
from headrace.cluster.credit import Credit, credit_of, has_credit
from headrace.cluster.demand import Demand
from headrace.cluster.facts import Fact
from headrace.cluster.holdings import Holdings, Prompt
from headrace.cluster.ledger import Accepted, Ledger, Leg, Stage
from headrace.cluster.options import GatewayOptions
from headrace.cluster.placement import (
    Possible,
    all_prefills,
    possible_homes,
    possible_prefills,
    why_no_prefill,
    why_whole,
)
from headrace.cluster.registry import Member, Registry
from headrace.cluster.routing import Candidates, Decision, Router, Wish
from headrace.cluster.waiting import NOBODY, Ahead
from headrace.engine.intake import shared_salt
from headrace.protocol.handoff import Leg as LegKind
from headrace.protocol.messages import (
    FromGateway,
    Heartbeat,
    KVEvents,
    KVSnapshot,
    KVWanted,
    Outputs,
    Submit,
)
from headrace.protocol.requests import GenerateRequest
from headrace.world import World

WORTH = 0.75
"""A prompt is computed at its home, however long it is, where that is at most this share of what the prefill
worker that would be soonest has to compute, which holds less of it. Measured: docs/performance.md."""

_GUESS_KEY_BITS = 256


class Placed(enum.Enum):
    """What came of an attempt to place a request."""

    YES = enum.auto()
    NO = enum.auto()
    """No worker has room or credit."""
    AWAITS_PREFILL = enum.auto()
    """One that would decode it has, and none that should compute its prompt."""


class Desk(Protocol):
    """What the gateway does for it."""

    def post(self, member: Member, message: FromGateway) -> None: ...
    def has_room(self, member: Member) -> None: ...


class Dispatch:
    """For one gateway."""

    def __init__(
        self,
        world: World,
        options: GatewayOptions,
        registry: Registry,
        ledger: Ledger,
        desk: Desk,
        report: Callable[[str], None],
    ) -> None:
        self._world = world
        self._options = options
        self._registry = registry
        self._ledger = ledger
        self._desk = desk
        self._epoch = f"{world.random.stream('gateway epoch').getrandbits(32):08x}"
        guess_key = world.random.stream("guess key").getrandbits(_GUESS_KEY_BITS).to_bytes(32, "big")
        self._holdings = Holdings(options.cache_key, guess_key)
        chance = world.random.stream("routing")
        self._new_router = functools.partial(Router, options.routing, self._holdings, chance, report)
        self._routers: dict[str, Router] = {}
        self._last: Prompt | None = None
        self.demand: defaultdict[str, Demand] = defaultdict(Demand)
        """Of each model: what was accepted lately."""
        self.router_of(registry.first_model)  # refuses a policy that there is not

    # ---- what workers tell ---------------------------------------------------------------------------

    def joined(self, member: Member) -> None:
        if self._holdings.joined(member):
            self._desk.post(member, KVWanted())

    def lost(self, member: Member) -> None:
        self._holdings.lost(member)

    def heard_cache(self, member: Member, message: KVEvents | KVSnapshot | Heartbeat) -> None:
        """A worker tells of its prefix cache; ask for all of it where something was missed."""
        match message:
            case KVSnapshot():
                self._holdings.snapshot(member, message)
                missed = False
            case KVEvents():
                missed = self._holdings.changed(member, message)
            case Heartbeat(kv_event=number):
                missed = self._holdings.stands_at(member, number)
        if missed:
            self._desk.post(member, KVWanted())

    def heard_step(self, member: Member, message: Outputs, now: float) -> None:
        """A worker's numbers are others."""
        for name in message.taken:
            member.has_seen(name)
        for output in message.outputs:
            member.outstanding.drop(output.request_id)
        for times in message.times:
            member.ended(times)
        if (stats := message.stats) is not None:
            member.told(stats, now)
            if stats.running + stats.waiting < member.most_samples:
                self._desk.has_room(member)

    # ---- requests ------------------------------------------------------------------------------------

    def credit(self, model: str) -> Credit:
        """What the workers of a model may be given now."""
        everybody = self._everybody(model)
        homes = possible_homes(everybody, 1)
        prefills = all_prefills(everybody, self._options.split)
        reserved = [band for band in Band if self.demand[model].more_urgent(band, self._world.now()).samples]
        return credit_of(homes.facts, prefills.facts, self._options.queue.steps_ahead, reserved)

    def _has_credit(self, possible: Possible, request: GenerateRequest) -> bool:
        band, steps = Band.of(request.priority), self._options.queue.steps_ahead
        reserve = self.demand[request.model].more_urgent(band, self._world.now()).samples > 0
        return bool(has_credit(possible.facts, band, steps, reserve=reserve).any())

    def place(self, accepted: Accepted) -> Placed:
        """Give a request to a worker. Raises ProtocolError for one too long to send.

        Among all that have room: one with credit is enough for the turn to be this request's, and where it
        goes then is the router's affair.
        """
        samples = accepted.samples
        possible = possible_homes(self._everybody(accepted.request.model), len(samples))
        if not possible or not self._has_credit(possible, accepted.request):
            return Placed.NO
        request, progress = accepted.request, accepted.progress
        generated = max(progress.generated.values(), key=len, default=[])
        prompt = accepted.prompt
        if prompt is None or prompt.tokens is not request.prompt or generated:
            prompt = accepted.prompt = self._prompt_of(request, generated)
        wish = Wish.of(request, len(prompt.tokens), len(samples))
        among = self.router_of(request.model).candidates(possible, wish, prompt, self._world.now())
        decision, home, uncached = self._choose(among, request.model, "decode")
        # Sample 0 is what a handoff carries; after its first token there is nothing to hand over.
        begins = 0 in samples and not samples[0].tokens
        where: dict[str, str | float] = {"why": "it goes on after its first token"}
        elsewhere = self._elsewhere(request, prompt, home, uncached, where) if begins else None
        if elsewhere is not None and not self._has_credit(elsewhere[0], request):
            return Placed.AWAITS_PREFILL
        accepted.journey.decisions.append(decision)
        accepted.attempts += 1
        name = f"{self._epoch}/{request.request_id}/{accepted.attempts}"
        split = elsewhere is not None
        accepted.home = self._ledger.open_leg(accepted, name, home)
        home.open_samples += len(samples)
        if elsewhere is not None:  # told only once the home has room; whoever is placed meanwhile knows of it
            accepted.stage = Stage.RESERVING
            self._plan_prefill(accepted, accepted.home, elsewhere[1])
        else:
            accepted.stage = Stage.AT_HOME
            home.expect(name, uncached, Band.of(request.priority))
        self._holdings.sent(home, prompt, self._world.now())
        self._desk.post(
            home,
            Submit(
                _as_sent(request, name),
                progress,
                LegKind.IMPORT if split else LegKind.WHOLE,
                self._options.split.prompt_length_threshold if split else 0,
            ),
        )
        accepted.journey.note(
            self._world.now(), "placed", home.worker_id, attempt=accepted.attempts, uncached_tokens=uncached
        )
        what = "offloaded" if split else "not offloaded"
        accepted.journey.note(self._world.now(), what, home.worker_id, **where)
        return Placed.YES

    def foresee(self, request: GenerateRequest, ahead: Ahead = NOBODY) -> Expectation | None:
        """What a request that came now would find; None: nobody could take it.

        Before it goes what is `ahead` of it, shared out among all workers that could take it. Its prompt is
        computed once it has rows where it is decoded, wherever that is done. Beside it decode all that are
        open, though some will have ended by then: others like it come in their place.
        """
        samples, now = request.sampling.n, self._world.now()
        possible = possible_homes(self._everybody(request.model), samples)
        if not possible:
            return None
        prompt = self._prompt_of(request)
        wish = Wish.of(request, len(prompt.tokens), samples)
        router = self.router_of(request.model)
        among = router.candidates(possible, wish, prompt, now)
        soonest = int(among.ttft_s.argmin())
        urgent = self._ledger.open_above(request.model, Band.of(request.priority))
        joined = prediction.joined(possible.facts, ahead.joining_per_s, urgent)
        # Those of one request decode together, those of one call where there is the most room.
        at_one = max(samples, math.ceil((samples + ahead.together) / len(joined)))
        tpots_s = prediction.tpot_s(joined, wish.prompt_tokens, np.zeros(len(joined)), at_one)
        calmest = int(tpots_s.argmin())
        tpot_s = float(tpots_s[calmest])
        home, uncached = among.members[soonest], float(among.uncached_tokens[soonest])
        elsewhere = self._elsewhere(request, prompt, home, uncached)
        computing, candidates = elsewhere or (possible, among)
        own_s, queue_s = candidates.computing_s(int(candidates.ttft_s.argmin()), Band.of(request.priority))
        together_s = prediction.computed_in_s(computing.facts, ahead.together_tokens)
        queue_s += prediction.computed_in_s(computing.facts, ahead.tokens)
        rows_s = _rows_in_s(possible, ahead, samples, request.sampling.max_tokens * tpot_s)
        queue_s = max(queue_s + together_s, rows_s)
        before_s = prediction.overtaken_s(computing.facts, queue_s, ahead)
        beside = bool(computing.facts[:, Fact.DECODES].any())
        return Expectation(
            own_s + before_s,
            tpot_s,
            elsewhere_s=0.0 if beside else own_s + before_s * (1 - rows_s / max(queue_s, 1e-9)),
            own_s=own_s + together_s,
            beside=float(joined[calmest, Fact.OPEN_SAMPLES]),
            row_s=float(prediction.row_s(joined, wish.prompt_tokens)[calmest]),
            lasts_s=float(joined[calmest, Fact.DECODE_S]),
            untried=among.untried(soonest) or candidates.untried(int(candidates.ttft_s.argmin())),
        )

    def passes_in_s(self, model: str, tokens: float, samples: float) -> float:
        """Until the workers of a model have computed so many prompt tokens, and so many sequences have ended
        there, at the pace of now."""
        live = self._everybody(model)
        homes = live.those(live.facts[:, Fact.DECODES] != 0)
        computing = all_prefills(live, self._options.split) or homes
        return max(
            prediction.computed_in_s(computing.facts, tokens), prediction.rows_in_s(homes.facts, samples)
        )

    def _elsewhere(
        self,
        request: GenerateRequest,
        prompt: Prompt,
        home: Member,
        uncached: float,
        noted: dict[str, str | float] | None = None,
    ) -> tuple[Possible, Candidates] | None:
        """Who could prefill a prompt of which so many tokens are to be computed at its home, and what is
        known of them; None: it is the home's to compute. `noted` gets why, and the numbers that decided.
        """
        noted = {} if noted is None else noted
        policy = self._options.split
        noted |= {"uncached_tokens": uncached, "prompt_length_threshold": policy.prompt_length_threshold}
        if why := why_whole(request, home, uncached, policy):
            noted["why"] = why
            return None
        possible = self.possible_prefills(home)
        if not possible:
            noted["why"] = why_no_prefill(self._registry.live(home.model), home)
            return None
        among = self._prefills_among(request, prompt, possible)
        soonest = int(among.ttft_s.argmin())
        theirs = float(among.uncached_tokens[soonest])
        there = among.members[soonest].worker_id
        noted |= {"soonest": there, "uncached_there": theirs, "offloaded_above": WORTH}
        noted["why"] = f"its home lacks {uncached / theirs:.2f} of what {there} does, soonest to prefill it"
        return (possible, among) if uncached > WORTH * theirs else None

    def possible_prefills(self, home: Member) -> Possible:
        """Who could prefill for a home now."""
        return possible_prefills(self._everybody(home.model), home, self._options.split)

    def place_prefill(self, accepted: Accepted, home: Leg) -> Leg | None:
        """Have a prompt computed for its home by another worker; None: none has room.

        Raises ProtocolError, with nothing changed, for one too long to send.
        """
        possible = self.possible_prefills(home.member)
        if not possible or accepted.prompt is None:
            return None
        member = home.prefills_at
        if member is None or member not in possible.members:
            among = self._prefills_among(accepted.request, accepted.prompt, possible)
            member = self._plan_prefill(accepted, home, among)
        self._desk.post(member, Submit(_as_sent(accepted.request, home.prefill_name), leg=LegKind.EXPORT))
        leg = self._ledger.open_leg(accepted, home.prefill_name, member)
        member.exports += 1
        self._holdings.sent(member, accepted.prompt, self._world.now())
        return leg

    def _plan_prefill(self, accepted: Accepted, home: Leg, among: Candidates) -> Member:
        """Choose who will compute a prompt for its home."""
        decision, member, uncached = self._choose(among, accepted.request.model, "prefill")
        accepted.journey.decisions.append(decision)
        home.plan_prefill(member, uncached, Band.of(accepted.request.priority))
        member.prefills(uncached)
        return member

    def _prefills_among(self, request: GenerateRequest, prompt: Prompt, possible: Possible) -> Candidates:
        """What is known of those that could prefill; whatever n is, a prompt is computed once."""
        wish = Wish.of(request, len(prompt.tokens), 1)
        return self.router_of(request.model).candidates(possible, wish, prompt, self._world.now())

    def _choose(self, among: Candidates, model: str, purpose: str) -> tuple[Decision, Member, int]:
        """A worker, and how many tokens of the prompt it has to compute."""
        member, decision = self.router_of(model).choose(among, purpose=purpose)
        return decision, member, among.wish.prompt_tokens - int(decision.cached_tokens[decision.chosen])

    def _prompt_of(self, request: GenerateRequest, generated: Sequence[int] = ()) -> Prompt:
        """What is to be computed for a request; the same again, with its blocks' names, for the one that was
        foreseen or tried last."""
        salt = shared_salt(request)
        if generated:
            return Prompt([*request.prompt, *generated], salt)
        if self._last is None or self._last.tokens is not request.prompt or self._last.salt != salt:
            self._last = Prompt(request.prompt, salt)
        return self._last

    def _everybody(self, model: str) -> Possible:
        """The live workers of a model."""
        return Possible(*self._registry.table(model))

    def router_of(self, model: str) -> Router:
        """Each model has its own: a policy that takes turns takes them among its workers."""
        if model not in self._routers:
            self._routers[model] = self._new_router()
        return self._routers[model]


def _rows_in_s(homes: Possible, ahead: Ahead, samples: int, lasts_s: float) -> float:
    """Until the last sample of a request has a row, and those of its call; each of these lasts at most so
    long."""
    facts = homes.facts
    rows = float(facts[:, Fact.ROWS].sum())
    others = max(0.0, float(facts[:, Fact.OPEN_SAMPLES].sum()) - ahead.yielding) + ahead.samples
    own = samples + ahead.together
    behind_others = min(max(others + own - rows, 0.0), max(others + 1 - rows, 0.0))
    behind_own = max(others + own - rows, 0.0) - behind_others
    mean_s = float(facts[:, Fact.DECODE_S].mean())
    return prediction.rows_in_s(facts, behind_others) + behind_own / rows * min(lasts_s, mean_s)


def _as_sent(request: GenerateRequest, leg_name: str) -> GenerateRequest:
    """What a worker needs to know of a request."""
    return msgspec.structs.replace(request, request_id=leg_name, model="", session="", tenant="")
