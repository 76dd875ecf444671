"""The gateway: it accepts requests for the workers that dialled in, and answers for their endings.

Whatever becomes of workers, each sample of each accepted request ends exactly once here, and everything that
is asked of it is bounded: what the workers would have to queue beyond their limits is refused at once.

State    | enters it by                                          | new requests
---------|-------------------------------------------------------|-------------
STARTING | construction                                          | UNAVAILABLE
READY    | a worker that decodes is registered                   | accepted
DEAD     | the last of these is gone, or says it cannot start    | UNAVAILABLE
DRAINING | `drain`; never leaves it                              | UNAVAILABLE
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Collection, Iterator

import msgspec

from headrace.cluster.handoff import Handoffs
from headrace.cluster.journey import Journey, Journeys
from headrace.cluster.ledger import Accepted, Leg, Sample, Stage
from headrace.cluster.membership import Membership
from headrace.cluster.observer import Ending, GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.placement import choose_home, may_split
from headrace.cluster.registry import Member, Registry, reference
from headrace.cluster.stream import OutputStream
from headrace.engine.limits import ModelLimits, RequestRefused, check_request
from headrace.protocol.handoff import Leg as LegKind
from headrace.protocol.messages import (
    Cancel,
    Drain,
    EngineInfo,
    FromGateway,
    FromWorker,
    ImportSettled,
    Outputs,
    Refused,
    SequenceTimes,
    Submit,
)
from headrace.protocol.requests import (
    ErrorCode,
    Finish,
    FinishReason,
    GenerateRequest,
    RequestError,
    SequenceOutput,
)
from headrace.world import ConnectionLost, World


class GatewayState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class StartFailedError(Exception):
    """A worker's engine cannot be built as asked; the text is the engine's own."""


class Gateway:
    """Between clients and workers. Everything happens on one event loop."""

    def __init__(
        self, world: World, observer: GatewayObserver | None = None, options: GatewayOptions | None = None
    ) -> None:
        self._world = world
        self._observer = observer or GatewayObserver()
        self._options = options or GatewayOptions()
        self._epoch = f"{world.random.stream('gateway epoch').getrandbits(32):08x}"
        self.registry = Registry(self._options)
        self.journeys = Journeys()
        self._membership = Membership(world, self._options, self.registry, self)
        self._handoffs = Handoffs(self._options.split, self.registry, self)
        self._was_ready = False
        self._draining = False
        self._start_failure: str | None = None
        self._accepted: dict[str, Accepted] = {}
        self._legs: dict[str, Accepted] = {}  # by the name of a home or prefill leg
        self._open_samples = 0
        self._waiting: dict[Accepted, None] = {}  # who lost a worker and has no other yet
        self._replaying: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # set, and replaced, whenever members or requests change

    # ---- what it is like -----------------------------------------------------------------------------

    async def listen(self, address: str) -> str:
        """Let workers dial in at `address` too; returns where exactly. Raises OSError, ValueError."""
        return await self._membership.listen(address)

    @property
    def address(self) -> str:
        """Where workers dial in."""
        return self._membership.address

    @property
    def state(self) -> GatewayState:
        if self._draining:
            return GatewayState.DRAINING
        if any(member.info.role.decodes for member in self.registry.live()):
            return GatewayState.READY
        gone = self._was_ready or self._start_failure is not None
        return GatewayState.DEAD if gone else GatewayState.STARTING

    @property
    def info(self) -> EngineInfo | None:
        """What the engines have in common, read from any of them; also of the last one that is gone."""
        return reference(self.registry.live()) or reference(self.registry)

    @property
    def open_samples(self) -> int:
        """Samples that have not ended, those of clients that left included."""
        return self._open_samples

    @property
    def start_failure(self) -> str | None:
        """Why a worker said it cannot start, if one did since another last could."""
        return self._start_failure

    async def wait_ready(self, workers: int = 1) -> EngineInfo:
        """Wait for so many workers, one that decodes among them.

        Raises StartFailedError when one says that it cannot start.
        """
        while self._start_failure is None:
            live = list(self.registry.live())
            if len(live) >= workers and any(member.info.role.decodes for member in live):
                return live[0].info.engine
            await self._changed.wait()
        raise StartFailedError(self._start_failure)

    async def wait_changed(self) -> None:
        """Wait until a worker comes or goes, or a request ends."""
        await self._changed.wait()

    def tell_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- workers come and go -------------------------------------------------------------------------

    def member_up(self, member: Member) -> None:
        if member.info.role.decodes:
            self._was_ready = True
        self._start_failure = None
        self._observer.engine_up(member.worker_id, member.info.engine)
        self.tell_changed()

    def member_failed(self, message: str) -> None:
        """A worker says that it will not come."""
        self._start_failure = message
        self.tell_changed()

    def member_lost(self, member: Member, why: str, *, died: bool) -> None:
        """Go on elsewhere with all that it had, or end it."""
        self._observer.engine_lost(member.worker_id)
        for name in sorted(member.legs):  # in an order that does not depend on hashes
            accepted = self._legs.get(name)
            if accepted is None:
                continue  # what became of another leg has ended it
            if accepted.prefill is not None and accepted.prefill.name == name:
                accepted.deaths += died
                accepted.journey.note(self._world.now(), "prefill worker lost", member.worker_id, why=why)
                if accepted.deaths < self._options.max_deaths:
                    self._handoffs.prefill_over(accepted)
                else:
                    self.replay(accepted, f"{member.worker_id} was lost ({why})")
            else:
                accepted.deaths += died
                self.replay(accepted, f"{member.worker_id} was lost ({why})")
        self.tell_changed()

    def heard(self, member: Member, message: FromWorker) -> None:
        """A registered worker says something about a request."""
        match message:
            case Outputs():
                self._take(member, message)
            case Refused(request_id=name, reason=reason):
                self._refused(name, reason)
            case _:
                self._handoffs.heard(message)

    def drain_worker(self, member: Member) -> None:
        """Let a worker go when what it has is over."""
        self.post(member, Drain())

    def handed_over(self, settled: ImportSettled) -> None:
        """A transfer has ended."""
        self._observer.handed_over(settled)

    # ---- outputs -------------------------------------------------------------------------------------

    def _take(self, member: Member, message: Outputs) -> None:
        now = self._world.now()
        all_times = iter(message.times)
        for output in message.outputs:
            times = next(all_times, None) if output.finish is not None else None
            accepted = self._legs.get(output.request_id)
            # What has ended here already (the client was told so) gets no second ending.
            if accepted is not None:
                self._of_leg(accepted, output, now, times)
        if message.stats is not None:
            member.stats = message.stats
            self._observer.step(member.worker_id, message.stats)

    def _of_leg(
        self, accepted: Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None
    ) -> None:
        if accepted.prefill is not None and accepted.prefill.name == output.request_id:
            self._handoffs.prefilled(accepted, output, now, times)
            return
        if output.finish is not None and accepted.home is not None:
            accepted.home.member.open_samples -= output.index in accepted.samples
        if output.finish is not None and _is_workers_fault(output.finish):
            self.replay(accepted, f"its worker gave it up ({_message(output.finish)})")
        else:
            self.deliver(accepted, output, now, times)

    def deliver(
        self,
        accepted: Accepted,
        output: SequenceOutput,
        now: float,
        times: SequenceTimes | None = None,
    ) -> None:
        """Write down and hand on what came of one sample, under the request's own id."""
        sample = accepted.samples.get(output.index)
        if sample is None:
            return
        request = accepted.request
        told = accepted.told_prompt
        output = SequenceOutput(
            request.request_id,
            output.index,
            output.tokens,
            output.logprobs,
            None if told else output.prompt_logprobs,
            None if told and output.index == 0 else output.cached_tokens,
            output.finish,
        )
        if output.tokens:
            if not sample.tokens:
                prompt = len(request.prompt) if output.index == 0 else 0
                self._observer.first_tokens(now - accepted.began_s, len(output.tokens), prompt)
                if output.index == 0:
                    accepted.told_prompt = True
                    accepted.journey.note(now, "first token", self._where(accepted))
            else:
                self._observer.next_tokens(now - sample.last_s, len(output.tokens))
            sample.tokens += output.tokens
            sample.last_s = now
        if output.finish is not None:
            self._end(accepted, sample, output.index, output.finish, now, times)
        accepted.stream.deliver(output)

    def _end(
        self,
        accepted: Accepted,
        sample: Sample,
        index: int,
        finish: Finish,
        now: float,
        times: SequenceTimes | None,
    ) -> None:
        request = accepted.request
        del accepted.samples[index]
        accepted.ended.append(index)
        self._open_samples -= 1
        reason = sample.counts_as if finish.reason is FinishReason.CANCELLED else finish.reason
        self._world.trace("gateway.end", request.request_id, index, finish.reason)
        accepted.journey.note(now, f"ended: {reason}", sample=index, tokens=len(sample.tokens))
        if not accepted.samples:
            self._forget(accepted)
        self._observer.ended(
            Ending(reason, request, index, len(sample.tokens), now - accepted.began_s, times)
        )

    def _forget(self, accepted: Accepted) -> None:
        """Everything of a request has ended; a prefill that may still run for it is not wanted."""
        del self._accepted[accepted.request.request_id]
        self._waiting.pop(accepted, None)
        self.leave_prefill(accepted)
        self.leave_home(accepted)
        self.tell_changed()

    def _where(self, accepted: Accepted) -> str:
        leg = accepted.prefill if accepted.stage is Stage.PREFILLING else accepted.home
        return leg.member.worker_id if leg is not None else ""

    # ---- legs ----------------------------------------------------------------------------------------

    def open_leg(self, accepted: Accepted, name: str, member: Member) -> Leg:
        member.legs.add(name)
        self._legs[name] = accepted
        return Leg(name, member)

    def leave_home(self, accepted: Accepted) -> None:
        """Nothing that the home may still say of this attempt counts."""
        leg, accepted.home = accepted.home, None
        if leg is not None:
            leg.member.open_samples -= len(accepted.samples)
            self._close_leg(leg)

    def leave_prefill(self, accepted: Accepted) -> None:
        """The prefill is over or not wanted any more; its blocks need not be held."""
        leg, accepted.prefill = accepted.prefill, None
        if leg is not None:
            leg.member.exports -= 1
            self._close_leg(leg)
            self.post(leg.member, Cancel(leg.name))

    def _close_leg(self, leg: Leg) -> None:
        leg.member.legs.discard(leg.name)
        del self._legs[leg.name]

    def accepted_of(self, leg_name: str) -> Accepted | None:
        """The request that a worker speaks of, if it is still that worker's."""
        return self._legs.get(leg_name)

    def post(self, member: Member, message: FromGateway) -> None:
        try:
            if member.is_live:
                member.channel.post(message)
        except ConnectionLost:
            return  # whoever reads from it learns the same and sees to its requests

    # ---- the client's side ---------------------------------------------------------------------------

    def submit(self, *requests: GenerateRequest) -> OutputStream:
        """Hand requests to workers, all of them or none.

        Raises RequestRefused: INVALID for what can never be served, OVERLOADED for what would not fit the
        workers' queues, UNAVAILABLE without a worker. An id in use is a ValueError.
        """
        try:
            stream = self._submit(*requests)
        except RequestRefused as refused:
            self._observer.refused(refused.error.code)
            raise
        for request in requests:
            self._observer.accepted(request)
        return stream

    def _submit(self, *requests: GenerateRequest) -> OutputStream:
        info, state = self.info, self.state
        if state is not GatewayState.READY or info is None:
            raise RequestRefused(ErrorCode.UNAVAILABLE, _WHY_UNAVAILABLE[state])
        limits = ModelLimits(info.max_model_len, info.vocab_size)
        for request in requests:
            if request.request_id in self._accepted:
                raise ValueError(f"request id {request.request_id!r} is in use")
            check_request(request, limits)
        self._check_room(requests)
        samples = [(r.request_id, index) for r in requests for index in range(r.sampling.n)]
        stream = OutputStream(samples, self.cancel)
        now = self._world.now()
        accepted = [self._accept(request, stream, now) for request in requests]
        try:
            for one in accepted:
                self._place(one)
        except Exception:  # what cannot be put into a message: all are taken back
            for one in accepted:
                self._take_back(one)
            raise
        return stream

    def _check_room(self, requests: tuple[GenerateRequest, ...]) -> None:
        """Raise RequestRefused where the workers cannot take them all."""
        homes = [member for member in self.registry.live() if member.info.role.decodes]
        wanted = sum(request.sampling.n for request in requests)
        most = sum(member.most_samples for member in homes)
        if wanted > most:
            message = f"{wanted} sequences are asked for at once, and the engine takes {most} at most"
            raise RequestRefused(ErrorCode.INVALID, message, "n")
        room = {member: member.room for member in homes if member.takes_more}
        for request in requests:
            member = max(room, key=lambda m: room[m], default=None)
            if member is None or room[member] < request.sampling.n:
                raise RequestRefused(
                    ErrorCode.OVERLOADED,
                    f"{self._open_samples} sequences run or wait, {wanted} more are asked for, and the "
                    f"limit is {most}; try again later",
                )
            room[member] -= request.sampling.n

    def _accept(self, request: GenerateRequest, stream: OutputStream, now: float) -> Accepted:
        journey = self.journeys.begin(request.request_id, len(request.prompt), now)
        samples = {index: Sample() for index in range(request.sampling.n)}
        accepted = Accepted(request, stream, now, journey, samples)
        self._accepted[request.request_id] = accepted
        self._open_samples += len(samples)
        self._world.trace("gateway.submit", request.request_id)
        return accepted

    def _take_back(self, accepted: Accepted) -> None:
        if accepted.home is not None:
            self.post(accepted.home.member, Cancel(accepted.home.name))
        self._open_samples -= len(accepted.samples)
        self._forget(accepted)

    def _place(self, accepted: Accepted) -> bool:
        """Give a request to a worker; False when none has room now."""
        live = list(self.registry.live())
        home = choose_home(live, len(accepted.samples))
        if home is None:
            accepted.waits_since_s = self._world.now()
            accepted.stage = Stage.WAITING
            self._waiting[accepted] = None
            self._start_replaying()
            return False
        request = accepted.request
        accepted.attempts += 1
        name = f"{self._epoch}/{request.request_id}/{accepted.attempts}"
        split = may_split(request, home, self._options.split) and self._handoffs.choose(home) is not None
        # Sample 0 is what a handoff carries; after its first token there is nothing to hand over.
        split = split and 0 in accepted.samples and not accepted.samples[0].tokens
        accepted.stage = Stage.RESERVING if split else Stage.AT_HOME
        accepted.home = self.open_leg(accepted, name, home)
        home.open_samples += len(accepted.samples)
        self.post(
            home,
            Submit(
                msgspec.structs.replace(request, request_id=name),
                accepted.progress,
                LegKind.IMPORT if split else LegKind.WHOLE,
                self._options.split.prompt_length_threshold if split else 0,
            ),
        )
        accepted.journey.note(self._world.now(), "placed", home.worker_id, attempt=accepted.attempts)
        return True

    def cancel(
        self, request_id: str, index: int | None = None, counts_as: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """End a request, or its sample `index`, if it has not ended; the worker answers with the ending.

        `counts_as` is what those who measure are told: a sample that a stop string ends is no cancellation.
        """
        accepted = self._accepted.get(request_id)
        if accepted is None:
            return
        which = [i for i in accepted.samples if index is None or i == index]
        for each in which:
            if accepted.samples[each].counts_as is not FinishReason.STOP:  # complete is complete
                accepted.samples[each].counts_as = counts_as
        if accepted.home is None:
            for each in which:
                output = SequenceOutput(request_id, each, finish=Finish(FinishReason.CANCELLED))
                self.deliver(accepted, output, self._world.now())
        elif which:
            self.post(accepted.home.member, Cancel(accepted.home.name, index))
            if 0 in which:
                self.leave_prefill(accepted)

    # ---- replay --------------------------------------------------------------------------------------

    def replay(self, accepted: Accepted, why: str) -> None:
        """Its worker is gone or gave it up: go on elsewhere from what was delivered, or end it."""
        now = self._world.now()
        lost = accepted.home.member if accepted.home is not None else None
        if accepted.home is not None:
            self.post(accepted.home.member, Cancel(accepted.home.name))
        self.leave_home(accepted)
        self.leave_prefill(accepted)
        if accepted.attempts >= self._options.max_attempts:
            self._end_all(accepted, f"{accepted.attempts} attempts at the request failed; {why}")
        elif accepted.deaths >= self._options.max_deaths:
            self._end_all(accepted, f"{accepted.deaths} workers were lost under the request; {why}")
        elif lost is not None and not self.registry.expects_other(lost, now):
            self._end_all(accepted, f"the engine was lost under the request: {why}; send it again")
        elif self._draining:
            self._end_all(accepted, f"the server is shutting down, and {why}; send it again")
        else:
            accepted.journey.note(now, "replayed", lost.worker_id if lost else "", why=why)
            self._observer.replayed()
            accepted.stage = Stage.WAITING
            accepted.waits_since_s = now
            self._waiting[accepted] = None
            self._start_replaying()

    def _refused(self, name: str, reason: str) -> None:
        accepted = self._legs.get(name)
        if accepted is None:
            return
        if accepted.prefill is not None and accepted.prefill.name == name:
            self._handoffs.prefill_over(accepted)
        else:
            self.replay(accepted, f"its worker refused it ({reason})")

    def _start_replaying(self) -> None:
        if self._replaying is None or self._replaying.done():
            self._replaying = asyncio.create_task(self._replay_all(), name="gateway.replay")

    async def _replay_all(self) -> None:
        """Place what waits, in order and at a pace; end what has waited for too long."""
        pause_s, most_s = self._options.replay_pause_s, self._options.replay_timeout_s
        while self._waiting:
            accepted = next(iter(self._waiting))
            left_s = accepted.waits_since_s + most_s - self._world.now()
            if choose_home(self.registry.live(), len(accepted.samples)) is not None:
                del self._waiting[accepted]
                self._place(accepted)
                await asyncio.sleep(pause_s)
            elif left_s <= 0:
                self._end_all(accepted, f"no other worker was free within {most_s:g} s; send it again")
            else:
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({changed}, timeout=left_s)
                changed.cancel()

    def _end_all(self, accepted: Accepted, why: str) -> None:
        finish = Finish(FinishReason.ERROR, error=RequestError(ErrorCode.UNAVAILABLE, why))
        for index in list(accepted.samples):
            output = SequenceOutput(accepted.request.request_id, index, finish=finish)
            self.deliver(accepted, output, self._world.now())

    # ---- the end -------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float, *, dismiss: Collection[str] = ()) -> bool:
        """Refuse new requests and let accepted ones end; then let the workers go, and those named end.

        What has not ended after `timeout_s` ends with UNAVAILABLE. Returns whether everything had ended.
        """
        self._draining = True
        self.tell_changed()
        in_time = await self._until(lambda: not self._accepted, timeout_s)
        for accepted in list(self._accepted.values()):
            for leg in (accepted.home, accepted.prefill):
                if leg is not None:
                    self.post(leg.member, Cancel(leg.name))
            self._end_all(accepted, "the server stopped before the request had ended; send it again")
        if self._replaying is not None:
            self._replaying.cancel()
            await asyncio.gather(self._replaying, return_exceptions=True)
        for member in self.registry.live():
            if member.worker_id in dismiss:
                self.post(member, Drain())
        await self._membership.close()
        return in_time

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    def unended(self) -> Iterator[Journey]:
        """The way so far of all that has not ended."""
        return (accepted.journey for accepted in self._accepted.values())


def _is_workers_fault(finish: Finish) -> bool:
    """Whether another worker may do better."""
    return finish.error is not None and finish.error.code in (ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED)


def _message(finish: Finish) -> str:
    return finish.error.message if finish.error is not None else finish.reason


_WHY_UNAVAILABLE = {
    GatewayState.STARTING: "the model is being loaded; try again later",
    GatewayState.READY: "the model is being loaded; try again later",
    GatewayState.DRAINING: "the server is shutting down",
    GatewayState.DEAD: "the engine has ended and is being started again; try again later",
}
