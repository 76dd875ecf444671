"""Requests whose worker was lost or gave them up: whether they may go on elsewhere, or have ended.

In: a request, and why. Out: a place at the front of the gateway's queue, from which it goes on from all that
was delivered; or an ending, when its budget is spent. How many of them a worker is given at a time is the
queue's affair, so that one worker's death is no flood at the others.
"""

from __future__ import annotations

from typing import Protocol

from headrace.cluster.backlog import Backlog
from headrace.cluster.delivery import Delivery
from headrace.cluster.ledger import Accepted
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import Member, Registry
from headrace.protocol.messages import Cancel, FromGateway
from headrace.world import World


class Desk(Protocol):
    """What the gateway does for a replay."""

    @property
    def is_draining(self) -> bool: ...
    def leave_home(self, accepted: Accepted) -> None: ...
    def leave_prefill(self, accepted: Accepted) -> None: ...
    def post(self, member: Member, message: FromGateway) -> None: ...


class Replays:
    """Of one gateway."""

    def __init__(
        self,
        world: World,
        options: GatewayOptions,
        registry: Registry,
        delivery: Delivery,
        backlog: Backlog,
        observer: GatewayObserver,
        desk: Desk,
    ) -> None:
        self._world = world
        self._options = options
        self._registry = registry
        self._delivery = delivery
        self._backlog = backlog
        self._observer = observer
        self._desk = desk
        self._counted: dict[tuple[str, int], list[Accepted]] = {}  # deaths by engine, while they matter

    def count_death(self, accepted: Accepted, member: Member) -> None:
        """A worker died under a request, as it seems."""
        accepted.deaths += 1
        self._counted = {engine: who for engine, who in self._counted.items() if any(a.samples for a in who)}
        self._counted.setdefault((member.worker_id, member.info.generation), []).append(accepted)

    def returned(self, member: Member) -> None:
        """A worker is there: if it is the engine that seemed to have died, only its connection had."""
        for accepted in self._counted.pop((member.worker_id, member.info.generation), []):
            accepted.deaths -= 1

    def again(self, accepted: Accepted, why: str, *, full: bool = False) -> None:
        """Its worker is gone or gave it up: go on elsewhere from what was delivered, or end it.

        A worker that was `full` has done nothing wrong: the request waits as if it had not been tried there.
        """
        desk, home = self._desk, accepted.home
        lost = home.member if home is not None else None
        if home is not None:
            desk.post(home.member, Cancel(home.name))
        desk.leave_home(accepted)
        desk.leave_prefill(accepted)
        self._delivery.end_cancelled(accepted)
        if not accepted.samples:
            return
        if not full:
            accepted.failures += 1
            accepted.waits_since_s = None
        if over := self._why_over(accepted, None if full else lost, why):
            self._delivery.end_all(accepted, over)
            return
        accepted.journey.note(self._world.now(), "replayed", lost.worker_id if lost else "", why=why)
        self._observer.replayed(accepted.request)
        self._backlog.enter_again(accepted)

    def _why_over(self, accepted: Accepted, lost: Member | None, why: str) -> str:
        """Why a request may not be tried again; empty: it may."""
        if accepted.failures >= self._options.max_failures:
            return f"{accepted.failures} attempts at the request failed; {why}"
        if accepted.deaths >= self._options.max_deaths:
            return f"{accepted.deaths} workers were lost under the request; {why}"
        if lost is not None and not self._registry.expects_other(lost, self._world.now()):
            return f"the engine was lost under the request: {why}; send it again"
        if self._desk.is_draining:
            return f"the server is shutting down, and {why}; send it again"
        return ""
