"""The net is proven: each of these planted defects is caught by the search.

A defect is one line of the code that serves done wrong; `seed` is the first one that notices, of lives with
faults of `kinds`. Without the defect the same lives break no promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from headrace.cluster.handoff import Handoffs
from headrace.cluster.ledger import Accepted
from headrace.engine.blocks import Pin
from headrace.engine.cache import KVCache
from headrace.engine.handoff import Handoffs as EngineHandoffs
from headrace.protocol.engine_messages import Continue
from headrace.protocol.messages import Role
from headrace.protocol.requests import FinishReason, Progress
from headrace.sim.connection import SimConnection
from headrace.sim.faults import Kind
from headrace.sim.life import FAULTS, live
from headrace.sim.search import Scope
from headrace.transfer.source import Exports, State
from headrace.worker.imports import Imports
from headrace.worker.life import EngineLife

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
    pass_on = EngineLife._pass_on

    def wrong(self: EngineLife, stepped: Any) -> None:
        kept = [
            output
            for output in stepped.outputs
            if not (output.index == 1 and output.finish and output.finish.reason is FinishReason.CANCELLED)
        ]
        pass_on(self, msgspec.structs.replace(stepped, outputs=kept))

    patch.setattr(EngineLife, "_pass_on", wrong)


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
    """Blocks are freed under a read when the lease expires, and the source confirms all the same."""

    def end(self: Exports, lease: Any, how: str) -> None:
        if lease.state is not State.RELEASED and not lease.how:
            lease.how = how
            self._stop_timer(lease)
            self._released(lease.request_id, how)
            if lease.reader is None:
                del self._leases[lease.request_id]
                del self._by_token[lease.token]

    def release(self: Exports, lease: Any) -> None:
        if self._leases.pop(lease.request_id, None) is not None:
            self._stop_timer(lease)
            del self._by_token[lease.token]
            if lease.how == "confirmed":
                self._released(lease.request_id, lease.how)

    patch.setattr(Exports, "_end", end)
    patch.setattr(Exports, "_release", release)


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


def stop_without_draining(patch: Patch) -> None:
    """A worker that is to drain leaves at once."""

    async def wrong(self: EngineLife) -> None:
        while not self.draining:
            await self._changed.wait()

    patch.setattr(EngineLife, "_wait_drained", wrong)


def leave_the_orphans_of_a_gateway(patch: Patch) -> None:
    """What a gateway that is gone had asked for goes on."""
    patch.setattr(EngineLife, "forget", lambda self, session: None)


@dataclass(frozen=True)
class Case:
    plant: Callable[[Patch], None]
    seed: int
    kinds: tuple[Kind, ...] = tuple(Kind)
    count: int = FAULTS
    roles: tuple[tuple[str, Role], ...] | None = None


_PAIR = (("p", Role.PREFILL), ("d", Role.DECODE))
_LATE = (Kind.LATE, Kind.NARROW)
CASES = [
    Case(skip_a_lease_release, 1),
    Case(accept_a_stale_ticket, 1, _LATE),
    Case(drop_a_terminal_message, 0),
    Case(repeat_a_token, 1),
    Case(replay_without_the_sampled_token, 1),
    Case(forget_the_salt, 0),
    Case(decode_before_the_confirmation, 5),
    Case(free_under_a_read_and_confirm, 6, (Kind.NARROW,), 12, _PAIR),
    Case(skip_the_quarantine, 1, _LATE),
    Case(skip_the_checksums, 2, (Kind.CORRUPT,)),
    Case(stop_without_draining, 0, (Kind.DRAIN,)),
    Case(leave_the_orphans_of_a_gateway, 1, (Kind.GATEWAY, Kind.GATEWAY_POWER)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.plant.__name__)
def test_a_planted_defect_is_caught(case: Case, monkeypatch: Patch) -> None:
    planned = Scope(case.kinds, case.roles, case.count).plan(case.seed)
    live(case.seed, planned)
    case.plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017  # which promise it breaks first is of no matter
        live(case.seed, planned)
