"""From what a worker says of one sample to what its client is told: written down, measured, handed on.

Each sample is delivered exactly one ending; what comes after it counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.cluster.ledger import Accepted, Ledger, Sample, Stage
from headrace.cluster.observer import Ending, GatewayObserver
from headrace.protocol.messages import SequenceTimes
from headrace.protocol.requests import ErrorCode, Finish, FinishReason, RequestError, SequenceOutput
from headrace.world import World


class Delivery:
    """For all requests of one gateway; `over` is called for a request with its last ending."""

    def __init__(
        self, world: World, observer: GatewayObserver, ledger: Ledger, over: Callable[[Accepted], None]
    ) -> None:
        self._world = world
        self._observer = observer
        self._ledger = ledger
        self._over = over

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
        told = accepted.told_prompt
        output = SequenceOutput(
            accepted.request.request_id,
            output.index,
            output.tokens,
            output.logprobs,
            None if told else output.prompt_logprobs,
            None if told and output.index == 0 else output.cached_tokens,
            output.finish,
        )
        if output.tokens:
            self._measure(accepted, sample, output, now)
            sample.tokens += output.tokens
            sample.last_s = now
        if output.finish is not None:
            self._end(accepted, sample, output.index, output.finish, now, times)
        accepted.stream.deliver(output)

    def end_all(
        self,
        accepted: Accepted,
        why: str,
        code: ErrorCode = ErrorCode.UNAVAILABLE,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        """End what has not ended of a request."""
        error = RequestError(code, why, retry_after_s=retry_after_s)
        self._finish(accepted, list(accepted.samples), Finish(FinishReason.ERROR, error=error))

    def end_cancelled(self, accepted: Accepted) -> None:
        """End what nobody wants, where no worker will say so."""
        unwanted = [index for index, sample in accepted.samples.items() if sample.cancelled]
        self._finish(accepted, unwanted, Finish(FinishReason.CANCELLED))

    def _finish(self, accepted: Accepted, samples: list[int], finish: Finish) -> None:
        for index in samples:
            output = SequenceOutput(accepted.request.request_id, index, finish=finish)
            self.deliver(accepted, output, self._world.now())

    def _measure(self, accepted: Accepted, sample: Sample, output: SequenceOutput, now: float) -> None:
        if sample.tokens:
            self._observer.next_tokens(accepted.request, now - sample.last_s, len(output.tokens))
            return
        sample.first_s = now
        if not accepted.answered:
            accepted.answered = True
            self._observer.answered(accepted.request, now - accepted.began_s)
        prompt = len(accepted.request.prompt) if output.index == 0 else 0
        self._observer.first_tokens(accepted.request, now - accepted.began_s, len(output.tokens), prompt)
        if output.index == 0:
            accepted.told_prompt = True
            accepted.journey.note(now, "first token", _where(accepted))

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
        self._ledger.end(accepted, index)
        reason = sample.counts_as if finish.reason is FinishReason.CANCELLED else finish.reason
        self._world.trace("gateway.end", request.request_id, index, finish.reason)
        accepted.journey.note(
            now, f"ended: {reason}", sample=index, tokens=len(sample.tokens), **_why(finish.error)
        )
        if not accepted.samples:
            self._over(accepted)
            if not accepted.answered and reason is FinishReason.ERROR:
                self._observer.answered(request, None)
            elif not accepted.answered and sample.cancelled_s is not None:
                self._observer.gave_up(request, sample.cancelled_s - accepted.began_s)
        after_first = len(sample.tokens) - 1
        tpot_s = (sample.last_s - sample.first_s) / after_first if after_first > 0 else None
        self._observer.ended(
            Ending(reason, request, index, after_first + 1, now - accepted.began_s, times, tpot_s)
        )


def _why(error: RequestError | None) -> dict[str, str | int]:
    """What the client is told, where it is an error."""
    if error is None:
        return {}
    again: dict[str, str | int] = (
        {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
    )
    return {"why": error.message, "code": str(error.code), **again}


def _where(accepted: Accepted) -> str:
    leg = accepted.prefill if accepted.stage is Stage.PREFILLING else accepted.home
    return leg.member.worker_id if leg is not None else ""
