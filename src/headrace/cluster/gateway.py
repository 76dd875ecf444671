"""The gateway: it accepts requests for the workers that dialled in, and answers for their endings.

Whatever becomes of workers, each sample of each accepted request ends exactly once here, and everything that
is asked of it is bounded: what the workers would have to queue beyond their limits is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator

from headrace.cluster.admission import Admission
from headrace.cluster.backlog import Backlog
from headrace.cluster.delivery import Delivery
from headrace.cluster.dispatch import Dispatch
from headrace.cluster.entrance import Entrance
from headrace.cluster.expectation import Naive, Predictive
from headrace.cluster.handoff import Handoffs
from headrace.cluster.journey import Journey, Journeys
from headrace.cluster.ledger import Accepted, Ledger
from headrace.cluster.membership import Membership
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.readiness import GatewayState, Readiness
from headrace.cluster.registry import Member, MemberState, Registry
from headrace.cluster.replay import Replays
from headrace.cluster.stream import OutputStream
from headrace.cluster.versions import Choice, Versions
from headrace.protocol.messages import (
    Cancel,
    Drain,
    EngineInfo,
    FromGateway,
    FromWorker,
    Heartbeat,
    KVEvents,
    KVSnapshot,
    Outputs,
    Refused,
    SequenceTimes,
)
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    SequenceOutput,
)
from headrace.world import ConnectionLost, World


class Gateway:
    """Between clients and workers. Everything happens on one event loop."""

    def __init__(
        self,
        world: World,
        observer: GatewayObserver | None = None,
        options: GatewayOptions | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`report` gets a line for people whenever a worker's state is another one."""
        self._world = world
        self._report = report
        self._observer = observer or GatewayObserver()
        self._options = options or GatewayOptions()
        self.registry = Registry(self._options)
        self.journeys = Journeys()
        self._readiness = Readiness(self.registry)
        self.versions = Versions(self._options, self._readiness.serves, world.random.stream("versions"))
        self._ledger = Ledger()
        self._membership = Membership(world, self._options, self.registry, self)
        self._dispatch = Dispatch(world, self._options, self.registry, self._ledger, self, report)
        self._delivery = Delivery(world, self._observer, self._ledger, self._forget)
        self.backlog = Backlog(
            world, self._options, self.registry, self._ledger, self._dispatch, self._delivery, self._observer
        )
        admission = self._options.admission
        naive = admission.policy == "naive"
        foresight = Naive(self.registry, self.backlog) if naive else Predictive(self._dispatch, self.backlog)
        self._entrance = Entrance(
            world,
            self.registry,
            self._readiness,
            Admission(admission, self._options.slo, foresight),
            self._ledger,
            self.journeys,
            self.backlog,
            self._observer,
            self,
        )
        self._handoffs = Handoffs(self._dispatch, self._ledger, self._observer, self)
        self._replays = Replays(
            world, self._options, self.registry, self._delivery, self.backlog, self._observer, self
        )

    # ---- what it is like -----------------------------------------------------------------------------

    async def listen(self, address: str, *, own: bool = False) -> str:
        """Let workers dial in at `address` too; returns where exactly. Raises OSError, ValueError.

        When one of our `own` cannot start, that is a failure of ours; a stranger's is its own affair.
        """
        return await self._membership.listen(address, own=own)

    @property
    def address(self) -> str:
        """Where workers dial in."""
        return self._membership.address

    @property
    def state(self) -> GatewayState:
        return self._readiness.state

    @property
    def takes_requests(self) -> bool:
        return self._readiness.takes_requests

    @property
    def info(self) -> EngineInfo | None:
        """What the engines have in common, also of the last one that is gone."""
        return self._readiness.info

    def info_of(self, model: str) -> EngineInfo | None:
        """What the engines of one model have in common, likewise."""
        return self._readiness.info_of(model)

    @property
    def start_failure(self) -> str | None:
        """Why a worker said it cannot start, if one did since another last could."""
        return self._readiness.start_failure

    @property
    def open_samples(self) -> int:
        """Samples that have not ended, those of clients that left included."""
        return self._ledger.open_samples

    @property
    def is_draining(self) -> bool:
        return self._readiness.is_draining

    async def wait_ready(self, workers: int = 1) -> EngineInfo:
        """Wait for so many workers, one that decodes among them.

        Raises StartFailedError when one says that it cannot start.
        """
        return await self._readiness.wait_ready(workers)

    async def wait_changed(self) -> None:
        """Wait until a worker comes or goes, or a request ends."""
        await self._readiness.wait_changed()

    def tell_changed(self) -> None:
        self._readiness.tell_changed()
        self.backlog.poke()

    # ---- workers come and go -------------------------------------------------------------------------

    def member_up(self, member: Member) -> None:
        self._observer.engine_up(member.info)
        self._dispatch.joined(member)
        self._replays.returned(member)
        self._readiness.member_up(member)

    def member_became(self, member: Member, state: MemberState) -> None:
        """A member's state is another one; one that is lost is told of by `member_lost`."""
        if not self.is_draining:
            self._report(f"{member.worker_id} is {state.in_words}")
        self._observer.worker_became(member.info, state)
        self.tell_changed()

    def member_failed(self, message: str) -> None:
        """A worker says that it will not come."""
        self._readiness.member_failed(message)

    def member_lost(self, member: Member, why: str, *, died: bool) -> None:
        """Go on elsewhere with all that it had, or end it."""
        if not self.is_draining:
            self._report(f"{member.worker_id} is gone: {why}")
        self._observer.engine_lost(member.worker_id)
        self._dispatch.lost(member)
        for name in sorted(member.legs):  # in an order that does not depend on hashes
            accepted = self._ledger.of_leg(name)
            if accepted is None:
                continue  # what became of another leg has ended it
            if died:
                self._replays.count_death(accepted, member)
            at_prefill = accepted.prefill is not None and accepted.prefill.name == name
            if at_prefill:
                accepted.journey.note(self._world.now(), "prefill worker lost", member.worker_id, why=why)
            if at_prefill and accepted.deaths < self._options.max_deaths:
                self._handoffs.prefill_over(accepted)
            else:
                self._replays.again(accepted, f"{member.worker_id} was lost: {why}")
        self.backlog.lost(member)
        self.tell_changed()

    def heard(self, member: Member, message: FromWorker) -> None:
        """A registered worker says something about a request."""
        match message:
            case Outputs():
                self._take(member, message)
            case Refused(request_id=name, reason=reason):
                self._refused(name, reason)
            case KVEvents() | KVSnapshot() | Heartbeat():
                self._dispatch.heard_cache(member, message)
            case _:
                self._handoffs.heard(message)

    def drain_worker(self, member: Member) -> None:
        """Let a worker go when what it has is over."""
        self.post(member, Drain())

    # ---- outputs -------------------------------------------------------------------------------------

    def _take(self, member: Member, message: Outputs) -> None:
        now = self._world.now()
        all_times = iter(message.times)
        for output in message.outputs:
            times = next(all_times, None) if output.finish is not None else None
            accepted = self._ledger.of_leg(output.request_id)
            # What has ended here already (the client was told so) gets no second ending.
            if accepted is not None:
                self._of_leg(accepted, output, now, times)
        self._dispatch.heard_step(member, message, now)
        self.backlog.poke()
        if message.stats is not None:
            self._observer.step(member.worker_id, message.stats)

    def _of_leg(
        self, accepted: Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None
    ) -> None:
        if accepted.prefill is not None and accepted.prefill.name == output.request_id:
            self._handoffs.prefilled(accepted, output, now, times)
            return
        if output.finish is not None and _is_workers_fault(output.finish):
            self._given_back(accepted, output.finish)
            return
        self.deliver(accepted, output, now, times)

    def _given_back(self, accepted: Accepted, finish: Finish) -> None:
        """Its worker ended it, and another one may do better."""
        error = finish.error
        full = error is not None and error.code is ErrorCode.OVERLOADED
        if full and accepted.home is not None:
            accepted.home.member.is_full = True
        why = error.message if error is not None else finish.reason
        self._replays.again(accepted, f"its worker gave it up: {why}", full=full)

    def has_room(self, member: Member) -> None:
        """What a worker had no room for a moment ago may be tried again."""
        if member.is_full:
            member.is_full = False
            self.tell_changed()

    def deliver(
        self, accepted: Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None = None
    ) -> None:
        """Tell the client what came of one sample."""
        self._delivery.deliver(accepted, output, now, times)

    def _forget(self, accepted: Accepted) -> None:
        """Everything of a request has ended; a prefill that may still run for it is not wanted."""
        self._ledger.strike_off(accepted)
        self.journeys.end(accepted.journey)
        self.backlog.forget(accepted)
        self.leave_prefill(accepted)
        self.leave_home(accepted)
        self.tell_changed()

    # ---- legs ----------------------------------------------------------------------------------------

    def leave_home(self, accepted: Accepted) -> None:
        """Nothing that the home may still say of this attempt counts."""
        leg, accepted.home = accepted.home, None
        if leg is not None:
            leg.member.open_samples -= len(accepted.samples)
            self._ledger.close_leg(leg)

    def leave_prefill(self, accepted: Accepted) -> None:
        """The prefill is over or not wanted any more; its blocks need not be held."""
        leg, accepted.prefill = accepted.prefill, None
        if leg is not None:
            leg.member.exports -= 1
            self._ledger.close_leg(leg)
            self.post(leg.member, Cancel(leg.name))

    def post(self, member: Member, message: FromGateway) -> None:
        """Say something to a worker. Raises ProtocolError for what is too long; then nothing was said."""
        try:
            if member.is_live:
                member.channel.post(message)
        except ConnectionLost:
            return  # whoever reads from it learns the same and sees to its requests

    # ---- the client's side ---------------------------------------------------------------------------

    def submit(self, *requests: GenerateRequest, choice: Choice | None = None) -> OutputStream:
        """Hand requests to workers, all of them or none; `choice` is how their model was chosen.

        Raises RequestRefused: INVALID for what can never be served, OVERLOADED for what would not fit the
        workers' queues, UNAVAILABLE without a worker; StepDown where the smaller model of `choice` is to
        serve them. An id in use is a ValueError.
        """
        return self._entrance.submit(requests, choice)

    def take_back(self, accepted: Accepted) -> None:
        """What was accepted is not, after all."""
        if accepted.home is not None:
            self.post(accepted.home.member, Cancel(accepted.home.name))
        self._forget(accepted)

    def cancel(
        self, request_id: str, index: int | None = None, counts_as: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """End a request, or its sample `index`, if it has not ended; the worker answers with the ending.

        `counts_as` is what those who measure are told: a sample that a stop string ends is no cancellation.
        """
        accepted = self._ledger.get(request_id)
        if accepted is None:
            return
        which = [i for i in accepted.samples if index is None or i == index]
        for each in which:
            sample = accepted.samples[each]
            if not sample.cancelled:
                sample.cancelled, sample.cancelled_s = True, self._world.now()
            if sample.counts_as is not FinishReason.STOP:  # complete is complete
                sample.counts_as = counts_as
        if accepted.home is None:
            self._delivery.end_cancelled(accepted)
        elif which:
            self.post(accepted.home.member, Cancel(accepted.home.name, index))
            if 0 in which:
                self.leave_prefill(accepted)

    def _refused(self, name: str, reason: str) -> None:
        accepted = self._ledger.of_leg(name)
        if accepted is None:
            return
        if accepted.prefill is not None and accepted.prefill.name == name:
            self._handoffs.prefill_over(accepted)
        else:
            self._replays.again(accepted, f"its worker refused it: {reason}")

    # ---- the end -------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float, *, dismiss: Collection[str] = ()) -> bool:
        """Refuse new requests and let accepted ones end; then let the workers go, and those named end.

        What has not ended after `timeout_s` ends with UNAVAILABLE. Returns whether everything had ended.
        """
        self._readiness.drain()
        in_time = await self._emptied(timeout_s)
        for accepted in self._ledger:
            for leg in (accepted.home, accepted.prefill):
                if leg is not None:
                    self.post(leg.member, Cancel(leg.name))
            self._delivery.end_all(accepted, "the server stopped before the request had ended; send it again")
        await self.backlog.close()
        for member in self.registry.live():
            if member.worker_id in dismiss:
                self.post(member, Drain())
        await self._membership.close()
        return in_time

    async def _emptied(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._ledger:
                    await self.wait_changed()
        except TimeoutError:
            return not self._ledger
        return True

    def unended(self) -> Iterator[Journey]:
        """The way so far of all that has not ended."""
        return (accepted.journey for accepted in self._ledger)


def _is_workers_fault(finish: Finish) -> bool:
    """Whether another worker may do better."""
    return finish.error is not None and finish.error.code in (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED)
