"""How requests come in: what can be served is admitted, owed its endings and placed; all requests of one
client's call, or none of them.

In: requests, and how their model was chosen. Out: a stream of outputs; or a refusal, after which nothing was
begun, and those who measure and the requests' journeys know why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from headrace.cluster.admission import Admission, check_room, check_servable
from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Band, Look, Refusal, Taken
from headrace.cluster.journey import Journey, Journeys
from headrace.cluster.ledger import Accepted, Ledger
from headrace.cluster.observer import GatewayObserver
from headrace.cluster.readiness import Readiness
from headrace.cluster.registry import Registry
from headrace.cluster.stream import OutputStream
from headrace.cluster.versions import Choice
from headrace.engine.limits import ModelLimits, RequestRefused, check_request
from headrace.protocol.channel import ProtocolError
from headrace.protocol.requests import ErrorCode, FinishReason, GenerateRequest
from headrace.world import World


class Desk(Protocol):
    """What the gateway does for it."""

    def cancel(self, request_id: str, index: int | None, counts_as: FinishReason) -> None: ...
    def take_back(self, accepted: Accepted) -> None: ...


class Entrance:
    """Of one gateway."""

    def __init__(
        self,
        world: World,
        registry: Registry,
        readiness: Readiness,
        admission: Admission,
        ledger: Ledger,
        journeys: Journeys,
        backlog: Backlog,
        observer: GatewayObserver,
        desk: Desk,
    ) -> None:
        self._world = world
        self._registry = registry
        self._readiness = readiness
        self._admission = admission
        self._ledger = ledger
        self._journeys = journeys
        self._backlog = backlog
        self._observer = observer
        self._desk = desk

    def submit(self, requests: Sequence[GenerateRequest], choice: Choice | None) -> OutputStream:
        """See `Gateway.submit`."""
        requests = self._registry.named(requests)
        for request in requests:
            if self._ledger.get(request.request_id) is not None:
                raise ValueError(f"request id {request.request_id!r} is in use")
        now = self._world.now()
        journeys = [self._journeys.begin(r.request_id, len(r.prompt), now) for r in requests]
        try:
            stream = self._submit(requests, choice, journeys)
        except RequestRefused as refused:
            why = Refusal.of(refused)
            self._refused(requests[0], journeys, refused, why)
            self._observer.refused(requests[0], why)
            raise
        except BaseException:  # a smaller model is to serve, or a defect
            for journey in journeys:
                self._journeys.drop(journey)
            raise
        if stream.degraded:
            self._observer.degraded(requests[0], stream.degraded)
        for request in requests:
            self._observer.accepted(request)
        return stream

    def _submit(
        self, requests: Sequence[GenerateRequest], choice: Choice | None, journeys: Sequence[Journey]
    ) -> OutputStream:
        info = self._readiness.check(requests[0].model)
        limits = ModelLimits(info.max_model_len, info.vocab_size)
        for request in requests:
            check_request(request, limits)
        _note_choice(journeys, choice)
        now = self._world.now()

        def tell(taken: Taken | None, look: Look | None) -> None:
            detail = look.detail() if look is not None else {"why": "nothing: no worker could take it now"}
            for journey in journeys:
                if taken is not None:
                    under = {"pressure": round(taken.pressure, 4)} if math.isfinite(taken.pressure) else {}
                    journey.note(now, "degraded", why=taken.step, above=taken.above, **under)
                journey.note(now, "foreseen", **detail)

        live = self._registry.live(requests[0].model)
        check_servable(live, requests)
        admitted = self._admission.admit(requests, choice, tell)
        most = sum(member.most_samples for member in live if member.info.role.decodes)
        check_room(admitted.requests, self._backlog, self._ledger.open_samples, most)
        self._backlog.make_room(admitted.requests)
        samples = [(r.request_id, index) for r in admitted.requests for index in range(r.sampling.n)]
        stream = OutputStream(samples, self._desk.cancel, admitted.degraded)
        accepted = [
            self._accept(request, stream, journey, now)
            for request, journey in zip(admitted.requests, journeys, strict=True)
        ]
        try:
            for one in accepted:
                self._backlog.enter(one)
        except BaseException as error:  # as what cannot be put into a message: all are taken back
            for one in accepted:
                self._desk.take_back(one)
            if isinstance(error, ProtocolError):
                raise RequestRefused(
                    ErrorCode.INVALID, f"too long to be sent to a worker: {error.reason}"
                ) from None
            raise
        return stream

    def _accept(
        self, request: GenerateRequest, stream: OutputStream, journey: Journey, now: float
    ) -> Accepted:
        """From now on the request is owed its endings."""
        accepted = self._ledger.enter(request, stream, journey, now)
        self._world.trace("gateway.submit", request.request_id)
        return accepted

    def _refused(
        self, first: GenerateRequest, journeys: Sequence[Journey], refused: RequestRefused, why: Refusal
    ) -> None:
        """Of all requests of the call together; what was foreseen for them stands before it."""
        now, error, band = self._world.now(), refused.error, Band.of(first.priority)
        again = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
        for journey in journeys:
            journey.note(now, "refused", why=error.message, reason=why, **{"class": band}, **again)
            self._journeys.refuse(journey)


def _note_choice(journeys: Sequence[Journey], choice: Choice | None) -> None:
    """How the model was chosen, where there was something to choose."""
    if choice is None:
        return
    for journey in journeys:
        if choice.why:
            journey.note(
                journey.began_s, "version drawn", model=choice.instead_of or choice.model, why=choice.why
            )
        if choice.instead_of:
            detail: dict[str, str | float] = {"why": f"model={choice.model}", "instead_of": choice.instead_of}
            if math.isfinite(choice.pressure):
                detail["pressure"] = round(choice.pressure, 4)
            journey.note(journey.began_s, "degraded", **detail)
