"""Requests that wait at the gateway for a worker, until one has credit, their time is over, or nobody wants
them any more.

In: requests without a worker, and word that something has changed. Out: calls of `place`, in the order of
`waiting.py`; endings for those whose deadline has passed, or whose place another gets. How many may wait is
decided before they are accepted (`admission.check_room`). Models have a queue each, for no worker serves two.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from headrace.cluster.classes import Band, Refusal, about, retry_after_s
from headrace.cluster.delivery import Delivery
from headrace.cluster.dispatch import Dispatch, Placed
from headrace.cluster.displacement import who_makes_way
from headrace.cluster.facts import Fact
from headrace.cluster.ledger import Accepted, Ledger, Stage
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.options import GatewayOptions
from headrace.cluster.placement import room_of
from headrace.cluster.registry import Member, Registry
from headrace.cluster.stream import OutputStream
from headrace.cluster.waiting import Ahead, Needs, Place, Waiting
from headrace.protocol.channel import ProtocolError
from headrace.protocol.requests import ErrorCode, GenerateRequest
from headrace.world import World


@dataclass(frozen=True, slots=True)
class Queue:
    """Those of one class that wait, of all models."""

    band: Band
    requests: int
    tokens: int
    """Of their prompts."""
    longest_s: float
    """How long the first come of them has waited."""


class Backlog:
    """All that waits for a worker at one gateway."""

    def __init__(
        self,
        world: World,
        options: GatewayOptions,
        registry: Registry,
        ledger: Ledger,
        dispatch: Dispatch,
        delivery: Delivery,
        observer: GatewayObserver,
    ) -> None:
        self._world = world
        self._options = options
        self._registry = registry
        self._ledger = ledger
        self._dispatch = dispatch
        self._delivery = delivery
        self._observer = observer
        self._lines: dict[str, Waiting[Accepted]] = {}
        """By model; those in which somebody waits."""
        self._deadlines: list[tuple[float, int, Accepted]] = []  # a heap; of some that wait no more, too
        self._number = itertools.count()
        self._moved = asyncio.Event()
        self._placing: asyncio.Task[None] | None = None

    # ---- who comes and goes --------------------------------------------------------------------------

    def enter(self, accepted: Accepted) -> None:
        """Place a request that is new, at once where nobody is before it and a worker has credit.

        Raises ProtocolError for one too long to send.
        """
        request = accepted.request
        tokens = len(request.prompt) * self._miss_ratio(request.model)
        self._dispatch.demand[request.model].came(
            Band.of(request.priority), tokens, request.sampling.n, self._world.now()
        )
        line = self._lines.get(accepted.request.model)
        needs, why = Needs(len(accepted.samples)), "others wait before it"
        if line is None or line.is_first(Band.of(accepted.request.priority)):
            placed = self._dispatch.place(accepted)
            if placed is Placed.YES:
                return
            needs = Needs(needs.samples, prefill=placed is Placed.AWAITS_PREFILL)
            why = "no worker that could prefill it has credit" if needs.prefill else "no worker has credit"
        self._wait(accepted, needs, why)

    def enter_again(self, accepted: Accepted) -> None:
        """Place a request that has lost its worker, before the others of its class."""
        self._wait(accepted, Needs(len(accepted.samples)), "it goes on elsewhere", again=True)

    def forget(self, accepted: Accepted) -> None:
        """It waits no more, if it did."""
        line = self._lines.get(accepted.request.model)
        if line is not None and accepted in line:
            line.remove(accepted)
            self._left(accepted, None)

    def lost(self, member: Member) -> None:
        """A worker is gone: where no other is there or expected, nobody of its model need wait."""
        line = self._lines.get(member.model)
        if line is None or self._registry.expects_other(member, self._world.now()):
            return
        for accepted in list(line):
            self._delivery.end_all(accepted, "the engine was lost before the request's turn; send it again")

    def poke(self) -> None:
        """Something has changed: perhaps a worker has credit now."""
        if self._lines:
            self._moved.set()

    async def close(self) -> None:
        if self._placing is not None:
            self._placing.cancel()
            await asyncio.gather(self._placing, return_exceptions=True)

    # ---- what it is like -----------------------------------------------------------------------------

    def __bool__(self) -> bool:
        return bool(self._lines)

    def requests(self, model: str) -> int:
        """How many wait for workers of one model."""
        return len(self._lines.get(model, ()))

    def takes(self, requests: Sequence[GenerateRequest]) -> bool:
        """Whether there is room for all of these, of one call, or others make way for them."""
        return not self._lacking(requests) or self._who_makes_way(requests) is not None

    def make_room(self, requests: Sequence[GenerateRequest]) -> None:
        """End those who make way for these."""
        if not self._lacking(requests):
            return
        band = Band.of(requests[0].priority)
        counted: set[OutputStream] = set()
        for accepted in self._who_makes_way(requests) or ():
            request = accepted.request
            urgent = Band.of(request.priority) is not band
            why = f"a request of {band} priority" if urgent else "one of a client with fewer requests waiting"
            accepted.journey.note(
                self._world.now(), "displaced", by_class=band, why=f"all places were taken, and {why} came"
            )
            if accepted.stream not in counted:  # the prompts of one call count once
                self._observer.refused(request, Refusal.DISPLACED)
                counted.add(accepted.stream)
            self._end_overloaded(accepted, f"all places were taken, and its own went to {why}")

    def _lacking(self, requests: Sequence[GenerateRequest]) -> int:
        """Places that others would have to leave. What is too much already, since a worker was lost, is not
        the newcomer's affair: it takes no more than its own."""
        wanted = sum(request.sampling.n for request in requests)
        return min(wanted, max(0, wanted - self.room(requests[0].model)))

    def _who_makes_way(self, requests: Sequence[GenerateRequest]) -> list[Accepted] | None:
        first = requests[0]
        line = self._lines.get(first.model)
        if line is None:
            return None
        wanted, lacking = sum(request.sampling.n for request in requests), self._lacking(requests)

        def call_of(accepted: Accepted) -> tuple[Accepted, ...]:
            """All of its call, where none of them has had a worker or an ending."""
            stream = accepted.stream
            call = (
                (accepted,)
                if len(accepted.samples) == stream.samples
                else tuple(one for one in line if one.stream is stream)
            )
            is_new = all(not one.attempts for one in call)
            return call if is_new and sum(len(one.samples) for one in call) == stream.samples else ()

        return who_makes_way(line, Band.of(first.priority), first.tenant, wanted, lacking, call_of)

    def room(self, model: str) -> int:
        """How many more samples the workers of one model have room for, beside all that wait for them."""
        line = self._lines.get(model)
        return room_of(self._registry.table(model)[1]) - (line.samples if line is not None else 0)

    def ahead(self, request: GenerateRequest, others: Sequence[GenerateRequest] = ()) -> Ahead:
        """What a request that came now would wait for here, behind the `others` of its call."""
        line, now, band = self._lines.get(request.model), self._world.now(), Band.of(request.priority)
        found = line.ahead(self._place_of(request, Needs())) if line is not None else Ahead()
        came = self._dispatch.demand[request.model].more_urgent(band, now)
        below = self._ledger.open_below(request.model, band)
        return replace(
            found,
            overtaking_per_s=came.tokens,
            joining_per_s=came.samples,
            together=sum(one.sampling.n for one in others),
            together_tokens=sum(len(one.prompt) for one in others) * self._miss_ratio(request.model),
            yielding=below - (line.samples_below(band) if line is not None else 0),
        )

    def frees_in_s(self, model: str, samples: int) -> float:
        """Until so many samples more could be accepted, at the pace of now: as many must have got a worker
        and ended, with prompts as long as those that wait."""
        line = self._lines.get(model)
        tokens = samples * line.tokens / line.samples if line is not None else 0.0
        return self._dispatch.passes_in_s(model, tokens, samples)

    def queues(self) -> Iterable[Queue]:
        """Every class, the most urgent first."""
        now = self._world.now()
        for band in Band:
            waiting = [one for line in self._lines.values() for one in line.of(band)]
            began_s = [now if one.waits_since_s is None else one.waits_since_s for one in waiting]
            tokens = sum(len(one.request.prompt) for one in waiting)
            yield Queue(band, len(waiting), tokens, now - min(began_s, default=now))

    # ---- waiting -------------------------------------------------------------------------------------

    def _wait(self, accepted: Accepted, needs: Needs, why: str, *, again: bool = False) -> None:
        request, now = accepted.request, self._world.now()
        accepted.stage = Stage.WAITING
        if accepted.waits_since_s is None:
            accepted.waits_since_s = now
        line = self._lines.setdefault(request.model, Waiting())
        place = self._place_of(request, needs)
        ahead = line.before(place.band)
        accepted.journey.note(now, "queued", why=why, band=place.band, requests_ahead=ahead)
        line.add(accepted, place, again=again)
        lasts_s = self._options.replay_timeout_s if accepted.failures else self._options.queue.timeout_s
        heapq.heappush(self._deadlines, (accepted.waits_since_s + lasts_s, next(self._number), accepted))
        self._observer.queued(request)
        self._moved.set()
        if self._placing is None or self._placing.done():
            self._placing = asyncio.create_task(self._place_all(), name="gateway.backlog")

    def _place_of(self, request: GenerateRequest, needs: Needs) -> Place:
        prompt, samples = len(request.prompt), request.sampling.n
        return Place(
            Band.of(request.priority),
            request.tenant,
            cost=prompt + samples * request.sampling.max_tokens,
            tokens=prompt * self._miss_ratio(request.model),
            samples=samples,
            needs=needs,
        )

    def _miss_ratio(self, model: str) -> float:
        """The share of prompt tokens that no cache had, by what the workers of a model have told."""
        _, facts = self._registry.table(model)
        queries = float(facts[:, Fact.PREFIX_QUERIES].sum())
        return 1 - float(facts[:, Fact.PREFIX_HITS].sum()) / queries if queries else 1.0

    def _left(self, accepted: Accepted, waited_s: float | None) -> None:
        if not self._lines[accepted.request.model]:
            del self._lines[accepted.request.model]
        self._observer.unqueued(accepted.request, waited_s)
        if len(self._deadlines) > 2 * sum(map(len, self._lines.values())) + 64:
            self._deadlines = [mark for mark in self._deadlines if self._waits(mark[2])]
            heapq.heapify(self._deadlines)

    def _waits(self, accepted: Accepted) -> bool:
        line = self._lines.get(accepted.request.model)
        return line is not None and accepted in line

    # ---- placing -------------------------------------------------------------------------------------

    async def _place_all(self) -> None:
        """Place whoever fits, whenever something has changed; end who has waited for too long."""
        while self._lines:
            self._moved.clear()
            for model in list(self._lines):
                while self._place_first(model):
                    await asyncio.sleep(0)  # who says something meanwhile is heard
            now = self._world.now()
            while self._deadlines and (
                self._deadlines[0][0] <= now or not self._waits(self._deadlines[0][2])
            ):
                _, _, accepted = heapq.heappop(self._deadlines)
                if self._waits(accepted):
                    self._end_late(accepted)
            if self._deadlines:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._deadlines[0][0] - now):
                        await self._moved.wait()

    def _place_first(self, model: str) -> bool:
        """Place one request of a model; False: nobody fits now."""
        line = self._lines.get(model)
        while line:
            credit = self._dispatch.credit(model)
            accepted = line.first(credit.fits)
            if accepted is None:
                return False
            try:
                placed = self._dispatch.place(accepted)
            except ProtocolError as error:  # with all that was generated it fits no message any more
                self._delivery.end_all(accepted, error.reason)
                return True
            if placed is Placed.YES:
                line.serve(accepted)
                self._left(accepted, self._waited_s(accepted))
                return True
            if placed is Placed.NO or line.place_of(accepted).needs.prefill:
                return False
            line.change(accepted, Needs(len(accepted.samples), prefill=True))
        return False

    def _waited_s(self, accepted: Accepted) -> float:
        since_s = accepted.waits_since_s
        return 0.0 if since_s is None else self._world.now() - since_s

    def _end_late(self, accepted: Accepted) -> None:
        if accepted.failures:
            most_s = self._options.replay_timeout_s
            why = f"no other worker was free within {most_s:g} s; send it again"
            self._delivery.end_all(accepted, why)
            return
        self._end_overloaded(
            accepted, f"no worker was free for it within {self._options.queue.timeout_s:g} s"
        )

    def _end_overloaded(self, accepted: Accepted, why: str) -> None:
        """Its client is told to come again when those before a newcomer have got their workers."""
        model = accepted.request.model
        line = self._lines[model]
        ahead = line.ahead(line.place_of(accepted))
        seconds = self._dispatch.passes_in_s(model, ahead.tokens, ahead.samples)
        again_s = retry_after_s(seconds)
        self._delivery.end_all(
            accepted,
            f"{why}; those who wait before a newcomer take {about(seconds)}: try again in {again_s} s",
            ErrorCode.OVERLOADED,
            retry_after_s=again_s,
        )
