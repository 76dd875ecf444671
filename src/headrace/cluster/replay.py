"""Requests that have no worker: those whose worker was lost, and those that found none with room.

In: a request, and why. Out: a new attempt elsewhere from all that was delivered, at a pace that does not make
one worker's death a flood at the others; or an ending, when its budget is spent or nobody came in time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Protocol

from headrace.cluster.delivery import Delivery
from headrace.cluster.ledger import Accepted, Stage
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.placement import possible_homes
from headrace.cluster.registry import Member, Registry
from headrace.protocol.channel import ProtocolError
from headrace.protocol.messages import Cancel, FromGateway
from headrace.world import World


class Desk(Protocol):
    """What the gateway does for a replay."""

    @property
    def is_draining(self) -> bool: ...
    def place(self, accepted: Accepted) -> None: ...
    def leave_home(self, accepted: Accepted) -> None: ...
    def leave_prefill(self, accepted: Accepted) -> None: ...
    def post(self, member: Member, message: FromGateway) -> None: ...
    async def wait_changed(self) -> None: ...


class Replays:
    """All that waits for a worker at one gateway."""

    def __init__(
        self,
        world: World,
        options: GatewayOptions,
        registry: Registry,
        delivery: Delivery,
        observer: GatewayObserver,
        desk: Desk,
    ) -> None:
        self._world = world
        self._options = options
        self._registry = registry
        self._delivery = delivery
        self._observer = observer
        self._desk = desk
        self._waiting: dict[Accepted, None] = {}  # in the order of their coming
        self._counted: dict[tuple[str, int], list[Accepted]] = {}  # deaths by engine, while they matter
        self._placing: asyncio.Task[None] | None = None

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
        self.wait(accepted)

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

    def wait(self, accepted: Accepted) -> None:
        """Place a request as soon as a worker has room."""
        accepted.stage = Stage.WAITING
        if accepted.waits_since_s is None:
            accepted.waits_since_s = self._world.now()
        self._waiting[accepted] = None
        if self._placing is None or self._placing.done():
            self._placing = asyncio.create_task(self._place_all(), name="gateway.replay")

    @property
    def waiting(self) -> Collection[Accepted]:
        return self._waiting

    def forget(self, accepted: Accepted) -> None:
        """It waits no more, if it did."""
        self._waiting.pop(accepted, None)

    async def close(self) -> None:
        if self._placing is not None:
            self._placing.cancel()
            await asyncio.gather(self._placing, return_exceptions=True)

    async def _place_all(self) -> None:
        """Place the first that fits, again and again at a pace; end what has waited for too long."""
        most_s = self._options.replay_timeout_s
        while self._waiting:
            now = self._world.now()
            impatient = [one for one in self._waiting if now >= self._patience_ends_s(one)]
            for accepted in [one for one in impatient if not self._fits(one)]:
                self._delivery.end_all(
                    accepted, f"no other worker was free within {most_s:g} s; send it again"
                )
            fits = (one for one in self._waiting if self._fits(one))
            if (first := next(fits, None)) is not None:
                self._place(first)
                await asyncio.sleep(self._options.replay_pause_s)
            elif self._waiting:
                ends_s = min(self._patience_ends_s(one) for one in self._waiting)
                with contextlib.suppress(TimeoutError):
                    # Awaited here and by no other task: one would begin to listen a turn of the loop later.
                    async with asyncio.timeout(ends_s - now):
                        await self._desk.wait_changed()

    def _fits(self, accepted: Accepted) -> bool:
        """Whether a worker of its model has room."""
        return bool(possible_homes(self._registry.live(accepted.request.model), len(accepted.samples)))

    def _patience_ends_s(self, accepted: Accepted) -> float:
        since_s = accepted.waits_since_s
        return (self._world.now() if since_s is None else since_s) + self._options.replay_timeout_s

    def _place(self, accepted: Accepted) -> None:
        del self._waiting[accepted]
        try:
            self._desk.place(accepted)
        except ProtocolError as error:  # with all that was generated it fits no message any more
            self._delivery.end_all(accepted, error.reason)
