"""The gateway: it accepts requests for the engine that dialled in, and answers for their endings.

Whatever becomes of the engine, each sample of each accepted request ends exactly once here, and everything
that is asked of it is bounded: what the engine would have to queue beyond its limits is refused at once.

State    | enters it by                                          | new requests
---------|-------------------------------------------------------|-------------
STARTING | construction                                          | UNAVAILABLE
READY    | an engine says Hello                                  | accepted
DEAD     | the engine's connection is lost, or it cannot start   | UNAVAILABLE
DRAINING | `drain`; never leaves it                              | UNAVAILABLE
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from headrace.cluster.observer import Ending, GatewayObserver
from headrace.cluster.stream import OutputStream
from headrace.engine.limits import ModelLimits, RequestRefused, check_request
from headrace.protocol.channel import Channel, ProtocolError
from headrace.protocol.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Drain,
    Drained,
    EngineInfo,
    FromGateway,
    FromWorker,
    Hello,
    Outputs,
    SequenceTimes,
    StartFailed,
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
from headrace.world import Connection, ConnectionLost, Listener, World

HELLO_TIMEOUT_S = 10.0
"""A worker dials in when its engine stands, so its first word comes at once."""

GOODBYE_TIMEOUT_S = 5.0
"""How long a drained or cancelled engine may take to say so."""


class GatewayState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class StartFailedError(Exception):
    """The engine cannot be built as asked; the text is the engine's own."""


@dataclass(slots=True, eq=False)
class _Sample:
    output_tokens: int = 0
    last_s: float = 0.0
    counts_as: FinishReason = FinishReason.CANCELLED
    """What its ending is, should it end by being cancelled."""


@dataclass(slots=True, eq=False)
class _Accepted:
    """A request that the engine has, and what has not ended of it."""

    request: GenerateRequest
    stream: OutputStream
    began_s: float
    samples: dict[int, _Sample] = field(default_factory=dict)


class Gateway:
    """Between clients and one engine. Everything happens on one event loop."""

    def __init__(self, world: World, observer: GatewayObserver | None = None) -> None:
        self._world = world
        self._observer = observer or GatewayObserver()
        self._state = GatewayState.STARTING
        self._listener: Listener | None = None
        self._channel: Channel[FromWorker] | None = None
        self._info: EngineInfo | None = None
        self._start_failure: str | None = None
        self._accepted: dict[str, _Accepted] = {}
        self._open_samples = 0
        self._changed = asyncio.Event()  # set, and replaced, whenever state or engine change

    # ---- the engine's side ---------------------------------------------------------------------------

    async def listen(self, address: str) -> str:
        """Let an engine dial in at `address`; returns where exactly. Raises OSError, ValueError."""
        self._listener = await self._world.network.listen(address, self._serve_worker)
        return self._listener.address

    @property
    def address(self) -> str:
        """Where the engine dials in."""
        if self._listener is None:
            raise RuntimeError("the gateway does not listen yet")
        return self._listener.address

    @property
    def state(self) -> GatewayState:
        return self._state

    @property
    def info(self) -> EngineInfo | None:
        """What the last engine that dialled in said of itself."""
        return self._info

    @property
    def open_samples(self) -> int:
        """Samples that the engine has not ended, those of clients that left included."""
        return self._open_samples

    @property
    def has_engine(self) -> bool:
        return self._channel is not None

    @property
    def start_failure(self) -> str | None:
        """Why the engine said it cannot start, if it did."""
        return self._start_failure

    async def wait_ready(self) -> EngineInfo:
        """Wait for an engine. Raises StartFailedError when it says that it cannot start."""
        while not self.has_engine and self._start_failure is None:
            await self._changed.wait()
        if self._start_failure is not None:
            raise StartFailedError(self._start_failure)
        if self._info is None:
            raise RuntimeError("an engine is connected that never said what it is")
        return self._info

    async def wait_lost(self) -> None:
        """Wait until no engine is connected."""
        while self.has_engine:
            await self._changed.wait()

    async def _serve_worker(self, connection: Connection) -> None:
        channel: Channel[FromWorker] = Channel(connection, receives=FromWorker)
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await channel.receive()
        if isinstance(first, StartFailed):
            self._start_failure = first.message
            self._become(GatewayState.DEAD)
            return
        if not isinstance(first, Hello) or first.protocol != PROTOCOL_VERSION:
            raise ProtocolError(connection.peer, f"began with {first!r}, not with Hello {PROTOCOL_VERSION}")
        if self._channel is not None:
            raise ProtocolError(connection.peer, "dialled in while another engine is connected")
        self._channel, self._info, self._start_failure = channel, first.engine, None
        self._observer.engine_up(first.engine)
        self._become(GatewayState.READY)
        why = "the engine ended under the request; send it again"
        try:
            while (message := await channel.receive()) is not None and not isinstance(message, Drained):
                if isinstance(message, Outputs):
                    self._take(message)
        except ConnectionLost as loss:
            why = f"the engine was lost under the request ({loss.reason}); send it again"
        finally:
            self._channel = None
            self._end_all(Finish(FinishReason.ERROR, error=RequestError(ErrorCode.UNAVAILABLE, why)))
            self._observer.engine_lost()
            self._become(GatewayState.DEAD)

    def _become(self, state: GatewayState) -> None:
        if self._state is not GatewayState.DRAINING:
            self._state = state
            self._world.trace("gateway.state", state)
        self._changed.set()
        self._changed = asyncio.Event()

    def _take(self, message: Outputs) -> None:
        now = self._world.now()
        all_times = iter(message.times)
        for output in message.outputs:
            times = next(all_times, None) if output.finish is not None else None
            accepted = self._accepted.get(output.request_id)
            # What has ended here already (the client was told so) gets no second ending.
            if accepted is not None and output.index in accepted.samples:
                self._deliver(accepted, output, now, times)
        if message.stats is not None:
            self._observer.step(message.stats)

    def _deliver(
        self, accepted: _Accepted, output: SequenceOutput, now: float, times: SequenceTimes | None = None
    ) -> None:
        sample = accepted.samples[output.index]
        if output.tokens:
            if sample.output_tokens == 0:
                self._observer.first_tokens(
                    now - accepted.began_s,
                    len(output.tokens),
                    len(accepted.request.prompt) if output.index == 0 else 0,
                )
            else:
                self._observer.next_tokens(now - sample.last_s, len(output.tokens))
            sample.output_tokens += len(output.tokens)
            sample.last_s = now
        if output.finish is not None:
            del accepted.samples[output.index]
            self._open_samples -= 1
            if not accepted.samples:
                del self._accepted[output.request_id]
            reason = output.finish.reason
            if reason is FinishReason.CANCELLED:
                reason = sample.counts_as
            self._world.trace("gateway.end", output.request_id, output.index, output.finish.reason)
            self._observer.ended(
                Ending(
                    reason,
                    accepted.request,
                    output.index,
                    sample.output_tokens,
                    now - accepted.began_s,
                    times,
                )
            )
        accepted.stream.deliver(output)

    def _end_all(self, finish: Finish) -> None:
        now = self._world.now()
        for accepted, index in list(self._unended()):
            output = SequenceOutput(accepted.request.request_id, index, finish=finish)
            self._deliver(accepted, output, now)

    def _unended(self) -> Iterator[tuple[_Accepted, int]]:
        for accepted in self._accepted.values():
            for index in accepted.samples:
                yield accepted, index

    # ---- the client's side ---------------------------------------------------------------------------

    def submit(self, *requests: GenerateRequest) -> OutputStream:
        """Hand requests to the engine, all of them or none.

        Raises RequestRefused: INVALID for what can never be served, OVERLOADED for what would not fit the
        engine's queue, UNAVAILABLE without an engine. An id in use is a ValueError.
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
        channel, info = self._channel, self._info
        if self._state is not GatewayState.READY or channel is None or info is None:
            raise RequestRefused(ErrorCode.UNAVAILABLE, _WHY_UNAVAILABLE[self._state])
        limits = ModelLimits(info.max_model_len, info.vocab_size)
        for request in requests:
            if request.request_id in self._accepted:
                raise ValueError(f"request id {request.request_id!r} is in use")
            check_request(request, limits)
        samples = [(r.request_id, index) for r in requests for index in range(r.sampling.n)]
        most = info.max_num_seqs + info.max_waiting
        if len(samples) > most:
            message = f"{len(samples)} sequences are asked for at once, and the engine takes {most} at most"
            raise RequestRefused(ErrorCode.INVALID, message, "n")
        if self._open_samples + len(samples) > most:
            raise RequestRefused(
                ErrorCode.OVERLOADED,
                f"{self._open_samples} sequences run or wait, {len(samples)} more are asked for, and the "
                f"limit is {most}; try again later",
            )
        self._post_all(channel, requests)
        stream = OutputStream(samples, self.cancel)
        now = self._world.now()
        for request in requests:
            open_samples = {index: _Sample() for index in range(request.sampling.n)}
            self._accepted[request.request_id] = _Accepted(request, stream, now, open_samples)
            self._world.trace("gateway.submit", request.request_id)
        self._open_samples += len(samples)
        return stream

    def cancel(
        self, request_id: str, index: int | None = None, counts_as: FinishReason = FinishReason.CANCELLED
    ) -> None:
        """End a request, or its sample `index`, if it has not ended; the engine answers with the ending.

        `counts_as` is what those who measure are told: a sample that a stop string ends is no cancellation.
        """
        accepted = self._accepted.get(request_id)
        if accepted is None or self._channel is None:
            return
        if index is None or index in accepted.samples:
            for each in accepted.samples if index is None else (index,):
                if accepted.samples[each].counts_as is not FinishReason.STOP:  # complete is complete
                    accepted.samples[each].counts_as = counts_as
            self._post(self._channel, Cancel(request_id, index))

    def _post_all(self, channel: Channel[FromWorker], requests: Sequence[GenerateRequest]) -> None:
        """Submit all or none: where one cannot be put into a message, those before it are taken back."""
        for number, request in enumerate(requests):
            try:
                self._post(channel, Submit(request))
            except Exception:
                for earlier in requests[:number]:
                    self._post(channel, Cancel(earlier.request_id))
                raise

    def _post(self, channel: Channel[FromWorker], message: FromGateway) -> None:
        try:
            channel.post(message)
        except ConnectionLost:
            return  # `_serve_worker` learns the same and ends everything

    # ---- the end -------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let accepted ones end, and let the engine go; then stop listening.

        What has not ended after `timeout_s` ends with UNAVAILABLE. Returns whether everything had ended.
        """
        self._become(GatewayState.DRAINING)
        if self._channel is not None:
            self._post(self._channel, Drain())
        in_time = await self._lost_within(timeout_s)
        if not in_time:
            why = "the server stopped before the request had ended; send it again"
            for request_id in list(self._accepted):
                self.cancel(request_id)
            self._end_all(Finish(FinishReason.ERROR, error=RequestError(ErrorCode.UNAVAILABLE, why)))
            if not await self._lost_within(GOODBYE_TIMEOUT_S) and self._channel is not None:
                self._channel.abort()
        if self._listener is not None:
            await self._listener.close()
        return in_time

    async def _lost_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_lost()
        except TimeoutError:
            return False
        return True


_WHY_UNAVAILABLE = {
    GatewayState.STARTING: "the model is being loaded; try again later",
    GatewayState.READY: "the model is being loaded; try again later",
    GatewayState.DRAINING: "the server is shutting down",
    GatewayState.DEAD: "the engine has ended and is being started again; try again later",
}
