"""The workers of a cluster as the gateway knows them. Soft state: all of it comes from what they announce.

State    | enters it by                                         | gets new requests
---------|------------------------------------------------------|----------------------------
UP       | registration; a word after a silence                 | yes
SUSPECT  | silence of `suspect_after_s`                         | where no other can
DRAINING | its own word                                         | no
DOWN     | connection lost, silence of `lapse_s`, its goodbye   | no; known for a while yet
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from headrace.cluster.classes import Band
from headrace.cluster.facts import Fact, Row, Table, new_row, table_of
from headrace.cluster.options import GatewayOptions
from headrace.cluster.outstanding import Outstanding
from headrace.cluster.pace import Pace
from headrace.protocol.channel import Channel
from headrace.protocol.messages import EngineInfo, FromWorker, SequenceTimes, StepStats, WorkerInfo
from headrace.protocol.requests import GenerateRequest


class MemberState(enum.StrEnum):
    UP = "up"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DOWN = "down"

    @property
    def in_words(self) -> str:
        """For people, after a worker's name."""
        return {"up": "heard again", "suspect": "silent; others get what is new"}.get(self, str(self))


class Unfit(Exception):
    """A worker that cannot be part of this cluster; the text names what does not fit."""


class UnfitNow(Unfit):
    """A worker that may be part of it in a while, when what it does not fit to is gone."""


_NUMBERS = {state: float(number) for number, state in enumerate(MemberState)}
UP, SUSPECT = _NUMBERS[MemberState.UP], _NUMBERS[MemberState.SUSPECT]
"""What states are among a member's facts."""


class _Fact:
    """An integer of a member that is kept in its row of facts."""

    def __init__(self, fact: Fact) -> None:
        self._fact = fact

    def __get__(self, member: Member, owner: type[Member]) -> int:
        return int(member.facts[self._fact])

    def __set__(self, member: Member, value: int) -> None:
        member.facts[self._fact] = value


class _Moment:
    """A moment of a member, in seconds, that is kept there too."""

    def __init__(self, fact: Fact) -> None:
        self._fact = fact

    def __get__(self, member: Member, owner: type[Member]) -> float:
        return float(member.facts[self._fact])

    def __set__(self, member: Member, value: float) -> None:
        member.facts[self._fact] = value


class Member:
    """One registered worker, for one life of its engine."""

    open_samples = _Fact(Fact.OPEN_SAMPLES)
    """Samples of its legs that have not ended."""
    exports = _Fact(Fact.EXPORTS)
    """Prompts that it is to prefill for others."""
    heard_s = _Moment(Fact.HEARD_S)
    """When it said anything last, on the gateway's clock."""
    is_full = _Fact(Fact.IS_FULL)
    """Whether it gave a request back for want of room, and has none by what it said since."""

    def __init__(self, info: WorkerInfo, channel: Channel[FromWorker], heard_s: float) -> None:
        engine, role = info.engine, info.role
        self.info = info
        self.worker_id = info.worker_id
        self.model = engine.model
        """Its group: requests go from one of its members to another, and to no others."""
        self.channel = channel
        self.why_down = ""
        self.down_s = 0.0
        self.step = 0
        self.engine_silent_s = 0.0
        self.stats: StepStats | None = None
        self.legs: set[str] = set()
        """Attempts that run there, exports included."""
        self.facts = new_row()
        self.heard_s = heard_s
        self.pace = Pace(self.facts)
        self._prefill_s, self._decode_s = _Lately(), _Lately()
        self.outstanding = Outstanding()
        """Prompts that it has to compute."""
        self._unseen: dict[str, int] = {}
        facts = self.facts
        facts[Fact.DECODES], facts[Fact.PREFILLS] = role.decodes, role.prefills_for_others
        facts[Fact.TRANSFERS] = info.transfers
        facts[Fact.MOST_SAMPLES], facts[Fact.ROWS] = self.most_samples, engine.max_num_seqs
        facts[Fact.BUDGET], facts[Fact.BLOCK] = engine.max_num_batched_tokens, engine.block_size
        self.state = MemberState.UP

    @property
    def state(self) -> MemberState:
        return self._state

    @state.setter
    def state(self, state: MemberState) -> None:
        self._state = state
        self.facts[Fact.STATE] = _NUMBERS[state]

    def keep_facts_in(self, row: Row) -> None:
        """From now on its facts are in this row, which has what they are now."""
        self.facts = row
        self.pace.keep_facts_in(row)

    def told(self, stats: StepStats, now: float) -> None:
        """Its numbers are others."""
        self.stats, facts = stats, self.facts
        facts[Fact.QUEUED], facts[Fact.TOLD_S] = stats.queued_tokens, now
        facts[Fact.RUNNING], facts[Fact.HELD] = stats.running, stats.held_tokens
        facts[Fact.PREFIX_QUERIES], facts[Fact.PREFIX_HITS] = stats.prefix_queries, stats.prefix_hits
        facts[Fact.HELD_SHARE] = stats.blocks_held / self.info.engine.num_blocks
        self.pace.stepped(stats, now)

    def ended(self, times: SequenceTimes) -> None:
        """A sequence has ended there."""
        self._prefill_s.take(times.prefill_s)
        self._decode_s.take(times.decode_s)
        self.pace.ended(times)

    def prefills(self, tokens: int) -> None:
        """It is to compute so many tokens of a prompt for another worker; nobody will say what they took."""
        fitted_s = self.facts[Fact.BASE_S] + self.facts[Fact.PER_TOKEN_S] * tokens
        self._prefill_s.take(float(fitted_s))

    @property
    def prefill_s(self) -> float:
        """What computing a prompt took on average, lately; 0 before the first."""
        return self._prefill_s.mean

    @property
    def decode_s(self) -> float:
        """What an answer took from its first token on, likewise."""
        return self._decode_s.mean

    def expect(self, leg_name: str, tokens: int, band: Band) -> None:
        """An attempt with so many prompt tokens to compute is on its way there."""
        self.outstanding.add(leg_name, band, tokens)
        self._unseen[leg_name] = tokens
        self.facts[Fact.UNSEEN] += tokens

    def leaves(self, leg_name: str) -> None:
        """The attempt is over."""
        self.outstanding.drop(leg_name)
        self.has_seen(leg_name)

    def has_seen(self, leg_name: str) -> None:
        """The attempt is in its engine's numbers, or over."""
        self.facts[Fact.UNSEEN] -= self._unseen.pop(leg_name, 0)

    @property
    def most_samples(self) -> int:
        return self.info.engine.max_num_seqs + self.info.engine.max_waiting

    @property
    def room(self) -> int:
        return 0 if self.is_full else self.most_samples - self.open_samples

    @property
    def is_live(self) -> bool:
        return self._state is not MemberState.DOWN

    @property
    def takes_more(self) -> bool:
        return self._state in (MemberState.UP, MemberState.SUSPECT)


MEMORY = 20
"""About so many of the last make an average; of fewer, all count alike."""


class _Lately:
    """An average that begins with its first value."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._count = 0

    def take(self, value: float | None) -> None:
        if value is not None:
            self._count = min(self._count + 1, MEMORY)
            self.mean += (value - self.mean) / self._count


_SAME = ("revision", "kv_layout", "dtype", "batch_invariant", "max_model_len", "vocab_size")
"""What workers of one model have in common."""


class Registry:
    """Members by name."""

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        self._members: dict[str, Member] = {}
        self._tables: dict[str, tuple[list[Member], Table]] = {}
        """By model: those that are live, and the table whose rows they write."""
        self._opened_s: float | None = None

    def opened(self, now: float) -> None:
        """Workers can dial in; those of a gateway that was here before do within two heartbeats."""
        self._opened_s = now if self._opened_s is None else self._opened_s

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def live(self, model: str | None = None) -> Iterable[Member]:
        """All that are there, or those of one model."""
        if model is not None:
            return self._table(model)[0]
        return (each for each in self if each.is_live)

    def table(self, model: str) -> tuple[list[Member], Table]:
        """The live members of one model, and their facts as they are now."""
        members, table = self._table(model)
        return members, table.copy()

    def _table(self, model: str) -> tuple[list[Member], Table]:
        found = self._tables.get(model)
        if found is None:
            members = [each for each in self if each.is_live and each.model == model]
            table = table_of([member.facts for member in members])
            for member, row in zip(members, table, strict=True):
                member.keep_facts_in(row)
            found = self._tables[model] = members, table
        return found

    def known(self, model: str) -> Iterable[Member]:
        """Those of one model, also the ones that are gone and may come back."""
        return (each for each in self if each.model == model)

    @property
    def first_model(self) -> str:
        """Of requests that name none; empty where nobody has said what there is."""
        if self._options.models:
            return self._options.models[0].name
        known = next(iter(self.live()), None) or next(iter(self), None)
        return known.model if known is not None else ""

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def register(
        self, info: WorkerInfo, channel: Channel[FromWorker], now: float, *, owes: bool = False
    ) -> Member | None:
        """Take a worker in; returns the former member of its name, still live, that it takes the place of.

        While the gateway `owes` answers, those that were lost with them count as well: what they began is not
        gone on with by another model. Raises Unfit.
        """
        info = self._of_model(info)
        former = self._members.get(info.worker_id)
        if former is not None and not former.is_live:
            former = None
        if former is not None and now - former.heard_s <= 2 * self._options.heartbeat_s:
            raise UnfitNow(f"another worker is called {info.worker_id!r}; give each its own name")
        for other in self.live():
            if other is not former and other.model == info.engine.model:
                _check_fit(info, other.info)
        self._check_fit_to_lost(info, now, owes)
        member = self._members[info.worker_id] = Member(info, channel, now)
        self._tables.pop(member.model, None)
        if former is not None:
            self._tables.pop(former.model, None)
        return former

    def down(self, member: Member, why: str, now: float) -> None:
        """A member is gone; it stays known for a while, as one that may come back."""
        member.state = MemberState.DOWN
        self._tables.pop(member.model, None)
        member.why_down, member.down_s = why, now

    def forget(self, now: float) -> None:
        """Those that have been gone for so long are not expected back."""
        for member in list(self):
            if not member.is_live and now - member.down_s > self._options.replay_timeout_s:
                del self._members[member.worker_id]

    def named(self, requests: Sequence[GenerateRequest]) -> tuple[GenerateRequest, ...]:
        """The requests with the model that they are of. Raises ValueError where it is not one."""
        if len({request.model for request in requests}) > 1:
            raise ValueError("requests that are made together are of one model")
        if requests[0].model:
            return tuple(requests)
        model = self.first_model
        return tuple([msgspec.structs.replace(request, model=model) for request in requests])

    def _of_model(self, info: WorkerInfo) -> WorkerInfo:
        """The worker under the name that the gateway has for its model. Raises Unfit where it has none.

        A worker may call its model by another name, where its weights leave no doubt.
        """
        engine, served = info.engine, self._options.models
        if not served:
            return info
        found = [one for one in served if one.name == engine.model]
        found = found or [one for one in served if one.revision == engine.revision]
        found = found or list(served) if len(served) == 1 else found
        if len(found) != 1:
            names = ", ".join(one.name for one in served)
            raise Unfit(
                f"its model is {engine.model!r}, and the gateway serves {names}; give it one of these names "
                "with --served-model-name, or name its model to the gateway"
            )
        (one,) = found
        if one.revision not in ("", engine.revision):
            raise Unfit(f"its model revision is {engine.revision}, and that of the gateway is {one.revision}")
        return msgspec.structs.replace(info, engine=msgspec.structs.replace(engine, model=one.name))

    def _check_fit_to_lost(self, info: WorkerInfo, now: float, owes: bool) -> None:
        """What waits for a worker was begun by one of these; it waits no longer than they are remembered."""
        try:
            for lost in self.known(info.engine.model):
                if owes and not lost.is_live and now - lost.down_s <= self._options.replay_timeout_s:
                    _check_fit(info, lost.info)
        except Unfit as unfit:
            raise UnfitNow(f"{unfit}, whose requests still wait") from unfit

    def expects_other(self, than: Member, now: float) -> bool:
        """Whether another worker of its model decodes, or may do so again soon; while the gateway is young,
        any may.
        """
        if self._opened_s is not None and now - self._opened_s <= 2 * self._options.heartbeat_s:
            return True
        return any(
            other.info.role.decodes
            and (other.is_live or now - other.down_s <= self._options.replay_timeout_s)
            for other in self.known(than.model)
            if other is not than and other.worker_id != than.worker_id
        )


def _check_fit(info: WorkerInfo, other: WorkerInfo) -> None:
    """Whoever may continue the other's requests must compute the same from the same bytes."""
    names = [*_SAME, "numerics"] if info.engine.batch_invariant else [*_SAME]
    for name in names:
        ours, theirs = getattr(info.engine, name), getattr(other.engine, name)
        if ours != theirs:
            raise Unfit(f"its {_words(name)} is {ours}, and that of {other.worker_id} is {theirs}")


def _words(name: str) -> str:
    return {"kv_layout": "KV block layout", "revision": "model revision"}.get(name, name.replace("_", " "))


def reference(members: Iterable[Member]) -> EngineInfo | None:
    """What the live engines have in common, read from any of them."""
    return next((member.info.engine for member in members), None)
