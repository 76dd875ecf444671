"""The gateway's part of a handoff: it brings a request's home and its prefill worker together.

    RESERVING ──home has reserved──▶ PREFILLING ──first token──▶ AT_HOME
        │ declined, or no prefill worker      │ prefill lost, refused, failed; the pull failed
        └──────────────▶ AT_HOME ◀────────────┘   (the home computes the prompt itself)

Whatever fails, the home ends up with one `Begin`, with the tokens that are known by then.
"""

from __future__ import annotations

from typing import Protocol

from headrace.cluster.dispatch import Dispatch
from headrace.cluster.journey import Journey
from headrace.cluster.ledger import Accepted, Ledger, Stage
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.registry import Member
from headrace.protocol.channel import ProtocolError
from headrace.protocol.messages import (
    Begin,
    Cancel,
    ExportEnded,
    ExportOffered,
    Fetch,
    FromGateway,
    FromWorker,
    ImportDeclined,
    ImportReserved,
    ImportSettled,
    SequenceTimes,
)
from headrace.protocol.requests import FinishReason, SequenceOutput
from headrace.world import World


class Desk(Protocol):
    """What the gateway does for a handoff."""

    _world: World

    def leave_prefill(self, accepted: Accepted) -> None: ...
    def post(self, member: Member, message: FromGateway) -> None: ...
    def deliver(
        self, accepted: Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None = None
    ) -> None: ...


class Handoffs:
    """All handoffs of one gateway; what it knows of each is in the ledger."""

    def __init__(
        self,
        dispatch: Dispatch,
        ledger: Ledger,
        observer: GatewayObserver,
        desk: Desk,
    ) -> None:
        self._dispatch = dispatch
        self._ledger = ledger
        self._observer = observer
        self._desk = desk

    def heard(self, message: FromWorker) -> None:
        """A worker says something about one of its legs; of legs that are over, nothing counts."""
        match message:
            case ImportReserved(request_id=name, cached_tokens=cached):
                if (accepted := self._home_of(name)) is not None and accepted.stage is Stage.RESERVING:
                    self._note(accepted, "reserved", cached_tokens=cached)
                    self._start_prefill(accepted)
            case ImportDeclined(request_id=name, cached_tokens=cached):
                accepted = self._home_of(name)
                if accepted is not None and accepted.home is not None:
                    accepted.stage = Stage.AT_HOME
                    accepted.home.drop_plan()
                    self._note(accepted, "prefilled at home, which has most of it", cached_tokens=cached)
            case ExportOffered(request_id=name, ticket=ticket):
                accepted = self._ledger.of_leg(name)
                if accepted is not None and accepted.home is not None:
                    self._fetch(accepted, Fetch(accepted.home.name, ticket))
            case ImportSettled(request_id=name) as settled:
                if (accepted := self._home_of(name)) is not None:
                    self._settled(accepted, settled)
            case ExportEnded(request_id=name):
                accepted = self._ledger.of_leg(name)
                if accepted is not None and accepted.prefill is not None and accepted.prefill.name == name:
                    self._desk.leave_prefill(accepted)

    def _fetch(self, accepted: Accepted, order: Fetch) -> None:
        if accepted.home is None:
            raise RuntimeError("blocks are to be fetched for a request without a home")
        try:
            self._desk.post(accepted.home.member, order)
        except ProtocolError as error:  # no fault of whoever is being heard
            self._note(accepted, "transfer failed", why=error.reason)
            self.prefill_over(accepted)

    def _start_prefill(self, accepted: Accepted) -> None:
        home = accepted.home
        if home is None:
            raise RuntimeError("a request without a home is to be prefilled")
        why = "no prefill worker has room"
        try:
            accepted.prefill = self._dispatch.place_prefill(accepted, home)
        except ProtocolError as error:
            why = f"no prefill worker can be told: {error.reason}"
        if accepted.prefill is None:
            home.drop_plan()
            self._note(accepted, why)
            self._begin(accepted, [])
            return
        accepted.stage = Stage.PREFILLING
        self._note(accepted, "prefill placed", accepted.prefill.member.worker_id)

    def prefilled(
        self, accepted: Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None
    ) -> None:
        """The prefill worker brings the first token, or an ending."""
        if accepted.stage is not Stage.PREFILLING:
            return
        finish = output.finish
        if finish is not None and finish.reason in (FinishReason.ERROR, FinishReason.CANCELLED):
            why = finish.error.message if finish.error is not None else str(finish.reason)
            self._note(accepted, "prefill failed", why=why)
            self.prefill_over(accepted)
            return
        home = accepted.home
        if home is None:
            raise RuntimeError("a prompt was prefilled for a request without a home")
        if finish is not None:  # its first token was its last
            self._desk.leave_prefill(accepted)
            self._desk.post(home.member, Cancel(home.name, output.index))
            accepted.stage = Stage.AT_HOME
            self._desk.deliver(accepted, output, now, times)
            return
        self._desk.deliver(accepted, output, now, times)
        if accepted.home is home:
            self._begin(accepted, list(output.tokens))

    def _settled(self, accepted: Accepted, settled: ImportSettled) -> None:
        if not settled.imported and 0 not in accepted.samples:
            return  # its sample ended before: the pull was given up, it did not fail
        self._observer.handed_over(accepted.request, settled)
        if settled.imported:
            self._note(
                accepted,
                "blocks transferred",
                bytes=settled.bytes_moved,
                blocks=settled.blocks,
                over=_ways(settled),
                wait_s=round(settled.wait_s, 6),
                move_s=round(settled.move_s, 6),
            )
            return
        self._note(accepted, "transfer failed", why=settled.reason)
        self.prefill_over(accepted)

    def prefill_over(self, accepted: Accepted) -> None:
        """Nobody prefills for the home any more: what it does not have yet, it computes itself."""
        self._desk.leave_prefill(accepted)
        if accepted.stage is Stage.PREFILLING:
            self._begin(accepted, [])

    def _begin(self, accepted: Accepted, generated: list[int]) -> None:
        if accepted.home is None:
            raise RuntimeError("a request without a home is to begin")
        accepted.stage = Stage.AT_HOME
        self._desk.post(accepted.home.member, Begin(accepted.home.name, generated))

    def _home_of(self, leg_name: str) -> Accepted | None:
        accepted = self._ledger.of_leg(leg_name)
        if accepted is None or accepted.home is None or accepted.home.name != leg_name:
            return None
        return accepted

    def _note(self, accepted: Accepted, what: str, worker: str = "", **detail: str | int | float) -> None:
        journey: Journey = accepted.journey
        journey.note(self._desk._world.now(), what, worker or self._home_name(accepted), **detail)

    @staticmethod
    def _home_name(accepted: Accepted) -> str:
        return accepted.home.member.worker_id if accepted.home is not None else ""


def _ways(settled: ImportSettled) -> str:
    """What the blocks came over."""
    if settled.read and settled.read < settled.blocks:
        return "NIXL and TCP"
    return "NIXL" if settled.read else "TCP"
