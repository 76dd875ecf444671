"""How requests come in: what can be served is admitted, owed its endings and placed; all requests of one
client's call, or none of them.

In: requests, and how their model was chosen. Out: a stream of outputs; or a refusal, after which nothing was
begun and those who measure know why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from headrace.cluster.admission import Admission, check_room
from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Refusal
from headrace.cluster.journey import Journeys
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
        try:
            stream = self._submit(requests, choice)
        except RequestRefused as refused:
            self._observer.refused(requests[0], Refusal.of(refused))
            raise
        if stream.degraded:
            self._observer.degraded(requests[0], stream.degraded)
        for request in requests:
            self._observer.accepted(request)
        return stream

    def _submit(self, requests: Sequence[GenerateRequest], choice: Choice | None) -> OutputStream:
        info = self._readiness.check(requests[0].model)
        limits = ModelLimits(info.max_model_len, info.vocab_size)
        for request in requests:
            if self._ledger.get(request.request_id) is not None:
                raise ValueError(f"request id {request.request_id!r} is in use")
            check_request(request, limits)
        admitted = self._admission.admit(requests, choice)
        live = self._registry.live(requests[0].model)
        check_room(live, admitted.requests, self._backlog, self._ledger.open_samples)
        samples = [(r.request_id, index) for r in admitted.requests for index in range(r.sampling.n)]
        stream = OutputStream(samples, self._desk.cancel, admitted.degraded)
        now = self._world.now()
        accepted = [self._accept(request, stream, now, choice) for request in admitted.requests]
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
        self, request: GenerateRequest, stream: OutputStream, now: float, choice: Choice | None
    ) -> Accepted:
        """From now on the request is owed its endings."""
        journey = self._journeys.begin(request.request_id, len(request.prompt), now)
        accepted = self._ledger.enter(request, stream, journey, now)
        self._world.trace("gateway.submit", request.request_id)
        if choice is not None and choice.why:
            journey.note(now, "version drawn", model=choice.instead_of or choice.model, why=choice.why)
        if stream.degraded:
            served = {"instead_of": choice.instead_of} if choice is not None and choice.instead_of else {}
            journey.note(now, "degraded", why=", ".join(stream.degraded), **served)
        return accepted
