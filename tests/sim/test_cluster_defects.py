"""The net is proven: each of these planted defects is caught by the search.

A defect is a line or two of the code that serves done wrong; `seed` is one whose standard life, or one with
faults of `kinds` only, notices. Without it these lives break no promise, as `test_cluster_faults` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from headrace.cluster.handoff import Handoffs
from headrace.cluster.ledger import Accepted
from headrace.config.engine import Connector
from headrace.engine.blocks import Pin
from headrace.engine.cache import KVCache
from headrace.engine.handoff import Handoffs as EngineHandoffs
from headrace.protocol.engine_messages import Continue, Release
from headrace.protocol.messages import Role
from headrace.protocol.requests import FinishReason, Progress
from headrace.sim.agent import SimAgent
from headrace.sim.cluster import Violation
from headrace.sim.connection import SimConnection
from headrace.sim.faults import Kind
from headrace.sim.life import live, plan
from headrace.transfer import target
from headrace.transfer.lease import State
from headrace.transfer.source import Exports
from headrace.worker.imports import Imports
from headrace.worker.relay import Relay

Patch = pytest.MonkeyPatch


def skip_a_lease_release(patch: Patch) -> None:
    """The engine strikes a lease from its books and keeps the blocks."""
    release = EngineHandoffs.release

    def wrong(self: EngineHandoffs, request_id: str) -> None:
        if self._kept.get(request_id, (None,))[0] is Pin.LEASED:
            del self._kept[request_id]
        else:
            release(self, request_id)

    patch.setattr(EngineHandoffs, "release", wrong)


def accept_a_stale_ticket(patch: Patch) -> None:
    """A lease that is over can still be read, and is confirmed."""
    release = Exports._release

    def wrong(self: Exports, lease: Any) -> None:
        if lease.request_id in self._leases:
            release(self, lease)
            self._by_token[lease.token] = lease
            lease.state, lease.how = State.HELD, ""

    patch.setattr(Exports, "_release", wrong)


def drop_a_terminal_message(patch: Patch) -> None:
    """The ending of a cancelled second sample gets lost."""
    pass_on = Relay._pass_on

    def wrong(self: Relay, stepped: Any) -> None:
        kept = [
            output
            for output in stepped.outputs
            if not (output.index == 1 and output.finish and output.finish.reason is FinishReason.CANCELLED)
        ]
        pass_on(self, msgspec.structs.replace(stepped, outputs=kept))

    patch.setattr(Relay, "_pass_on", wrong)


def repeat_a_token(patch: Patch) -> None:
    """A replay goes on one token too early."""

    def wrong(self: Accepted) -> Progress:
        generated = {index: sample.tokens[:-1] for index, sample in self.samples.items() if sample.tokens}
        return Progress(generated=generated, ended=list(self.ended), prompt_logprobs_told=self.told_prompt)

    patch.setattr(Accepted, "progress", property(wrong))


def replay_without_the_sampled_token(patch: Patch) -> None:
    """The home is told to begin, not with which token."""
    begin = Handoffs._begin
    patch.setattr(Handoffs, "_begin", lambda self, accepted, generated: begin(self, accepted, []))


def forget_the_salt(patch: Patch) -> None:
    """All tenants share one cache."""
    root = KVCache.root
    patch.setattr(KVCache, "root", lambda self, salt: root(self, ""))


def decode_before_the_confirmation(patch: Patch) -> None:
    """An import decodes as soon as there is a first token, while its blocks still come."""
    begin = Imports.begin

    def wrong(self: Imports, request_id: str, generated: list[int]) -> None:
        one = self._open.get(request_id)
        if one is not None and one.pull is not None and generated:
            self._to_engine(Continue(request_id, True, generated))
        begin(self, request_id, generated)

    patch.setattr(Imports, "begin", wrong)


def free_under_a_read_and_confirm(patch: Patch) -> None:
    """Blocks are freed under a read when the lease expires, and the source confirms all the same.

    Freed and not confirmed would be harmless, since a target uses nothing without the confirmation: each of
    the two is enough for right tokens, and what is planted breaks both.
    """

    end = Exports._end

    def wrong(self: Exports, lease: Any, how: str) -> None:
        if how != "expired" or lease.reader is None:
            end(self, lease, how)
        else:
            lease.how = how
            self._stop_timer(lease)
            self._released(lease.request_id, how)

    patch.setattr(Exports, "_end", wrong)


def free_a_dropped_import_under_its_pull(patch: Patch) -> None:
    """Blocks are the engine's again while bytes still come into them."""
    drop = Imports.drop

    def wrong(self: Imports, request_id: str) -> None:
        if request_id in self._open:
            self._to_engine(Release(request_id))
        drop(self, request_id)

    patch.setattr(Imports, "drop", wrong)


def ignore_the_generation_of_tickets_that_repeat(patch: Patch) -> None:
    """A ticket of a former life of an engine opens what has its number in this one.

    The generation by itself catches nothing that the token would not: a token is a hash keyed with a secret
    of its life, so one of another life names no lease and is denied for that. The two are one promise made
    twice, and what is planted breaks both: tokens are counted, and of which life they are is not asked.
    """
    init, read = Exports.__init__, Exports._read

    def counting(self: Exports, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self._secret = bytes(32)

    async def wrong(self: Exports, task: Any, connection: Any, channel: Any, want: Any) -> None:
        await read(
            self, task, connection, channel, msgspec.structs.replace(want, generation=self._generation)
        )

    patch.setattr(Exports, "__init__", counting)
    patch.setattr(Exports, "_read", wrong)


def skip_the_quarantine(patch: Patch) -> None:
    """The engine lets go of what a transport may still write."""
    keep = EngineHandoffs._keep

    def wrong(self: EngineHandoffs, sequence: Any, pin: Any) -> None:
        keep(self, sequence, pin)
        self.release(sequence.request.request_id)

    patch.setattr(EngineHandoffs, "_keep", wrong)


def skip_the_checksums(patch: Patch) -> None:
    """Nobody compares what arrived with what was sent."""
    read, write = SimConnection.read_into, SimConnection.write_from

    async def read_into(self: Any, buffers: Any) -> list[int]:
        return [0 for _ in await read(self, buffers)]

    async def write_from(self: Any, buffers: Any) -> list[int]:
        return [0 for _ in await write(self, buffers)]

    patch.setattr(SimConnection, "read_into", read_into)
    patch.setattr(SimConnection, "write_from", write_from)


def skip_the_checksums_of_reads(patch: Patch) -> None:
    """Nobody compares what was read with what is at the source."""

    async def wrong(self: SimAgent, offsets: Any, size: int) -> list[int]:
        return [0 for _ in offsets]

    patch.setattr(SimAgent, "checksums", wrong)


def end_a_pull_under_its_read(patch: Patch) -> None:
    """A pull that is given up ends while its read still writes."""

    async def wrong(task: Any) -> None:
        pass

    patch.setattr(target, "_over", wrong)


def stop_without_draining(patch: Patch) -> None:
    """A worker that is to drain leaves at once."""

    async def wrong(self: Relay) -> None:
        while not self.draining:
            await self._changed.wait()

    patch.setattr(Relay, "wait_drained", wrong)


def leave_the_orphans_of_a_gateway(patch: Patch) -> None:
    """What a gateway that is gone had asked for goes on."""
    patch.setattr(Relay, "forget", lambda self, session: None)


@dataclass(frozen=True)
class Case:
    plant: Callable[[Patch], None]
    seed: int
    kinds: tuple[Kind, ...] = tuple(Kind)
    connector: Connector = "tcp"


CASES = [
    Case(skip_a_lease_release, 2),
    Case(accept_a_stale_ticket, 7),
    Case(drop_a_terminal_message, 2),
    Case(repeat_a_token, 3),
    Case(replay_without_the_sampled_token, 1),
    Case(forget_the_salt, 0),
    Case(decode_before_the_confirmation, 1),
    Case(free_under_a_read_and_confirm, 22),
    Case(free_a_dropped_import_under_its_pull, 2, connector="auto"),
    Case(skip_the_quarantine, 1),
    Case(skip_the_checksums, 2),
    Case(skip_the_checksums_of_reads, 1, (Kind.CORRUPT,), "auto"),
    Case(end_a_pull_under_its_read, 14, connector="auto"),
    Case(stop_without_draining, 0, (Kind.DRAIN,)),
    Case(leave_the_orphans_of_a_gateway, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.plant.__name__)
def test_a_planted_defect_is_caught(case: Case, monkeypatch: Patch) -> None:
    case.plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017  # which promise it breaks first is of no matter
        live(case.seed, plan(case.seed, kinds=case.kinds, connector=case.connector))


def test_a_ticket_of_a_former_life_opens_nothing(monkeypatch: Patch) -> None:
    """Leases stay unread behind cut links while the engine is lost and old tickets come.

    Among faults of all kinds a lease without a reader seldom has the number of a ticket of the life before,
    so these are of the kinds that it takes, at the two workers that it takes.
    """
    kinds = (Kind.ENGINE, Kind.STALE, Kind.CUT_ONE_WAY, Kind.CUT)
    clusters = [{"p": Role.PREFILL, "d": Role.DECODE}]
    planned = plan(103, kinds=kinds, clusters=clusters, count=14, connector="tcp")
    live(103, planned)
    ignore_the_generation_of_tickets_that_repeat(monkeypatch)
    with pytest.raises(Violation, match="gave other blocks for a ticket"):
        live(103, planned)
