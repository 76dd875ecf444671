"""Whether requests may come in, and with what.

    no room in the workers' queues ──▶ refused            (all classes)
    pressure above a step of the ladder ──▶ degraded      (normal and low)
    pressure above 1 ──▶ refused, with the estimate and when to try again   (normal and low)

Pressure is the predicted TTFT or TPOT against what the class of the request may expect, whichever is worse,
for all that its client asks for in one call. Fewer samples and shorter answers are taken only for what of it
they can relieve: not for a wait for workers that decode nothing.
A high-priority request is neither degraded nor refused while there is room. A step to a smaller model is for
whoever made the request, and has its text: admission only says so, and the ladder begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Band, Expectation, Look, Slo, Taken, WouldWait, about, retry_after_s
from headrace.cluster.expectation import Foresight
from headrace.cluster.options import AdmissionOptions, DegradeStep, ServiceLevels
from headrace.cluster.registry import Member
from headrace.cluster.versions import Choice, StepDown
from headrace.engine.limits import RequestRefused
from headrace.protocol.requests import ErrorCode, GenerateRequest

TPOT_SHARE = 0.9
"""Of the objective: up to so much of it workers are filled. All that decode together have one TPOT, so filled
to the limit itself they would all miss it every other time, those of high priority too."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What is accepted instead of what was asked for."""

    requests: tuple[GenerateRequest, ...]
    degraded: tuple[str, ...] = ()
    """What was taken from each of them, as `n=1`."""


class Admission:
    """For one gateway. Decides on the requests of one client together: all of them, or none."""

    def __init__(self, options: AdmissionOptions, slo: ServiceLevels, foresight: Foresight) -> None:
        self._options = options
        self._slo = slo
        self._foresight = foresight
        self._tpot_s = TPOT_SHARE * slo.tpot_s

    def admit(
        self,
        requests: Sequence[GenerateRequest],
        choice: Choice | None = None,
        tell: Callable[[Taken | None, Look | None], None] = lambda taken, look: None,
    ) -> Admitted:
        """Raises WouldWait with the estimate and when to try again; StepDown where the smaller model of their
        `choice` is to serve them.

        `tell` gets each look at what they would wait, after which step of the ladder (None: as they came).
        """
        options = self._options
        band = Band.of(requests[0].priority)
        if band is Band.HIGH or not (options.early_rejection or options.degrade):
            return Admitted(tuple(requests))
        taken = [f"model={choice.model}"] if choice is not None and choice.instead_of else []
        expected = self._foresight.expect(requests)
        tell(None, self._look(expected, band))
        for step in options.degrade:
            pressure = math.inf if expected is None else self._relieved_by(step, expected, band)
            if pressure <= step.above:
                continue
            if step.lower == "model":
                self._step_down(requests, pressure, choice)
                continue
            lower = [_lowered(request, step) for request in requests]
            found = self._foresight.expect(lower) if lower != list(requests) else None
            if found is not None:
                requests, expected = lower, found
                taken.append(step.in_words(""))
                tell(Taken(taken[-1], pressure, step.above), self._look(expected, band))
        if expected is not None and self._refuses(expected, band):
            raise self._refusal(expected, band)
        return Admitted(tuple(requests), tuple(taken))

    def _step_down(self, requests: Sequence[GenerateRequest], pressure: float, choice: Choice | None) -> None:
        """Raise StepDown where the smaller model is under less; its tokens are taken to be as many."""
        if choice is None or not choice.smaller:
            return
        theirs = [msgspec.structs.replace(request, model=choice.smaller) for request in requests]
        smaller = self._foresight.expect(theirs)
        if smaller is not None and self._pressure(smaller, Band.of(requests[0].priority)) < pressure:
            raise StepDown(pressure)

    def _limit_s(self, band: Band) -> float:
        """The TTFT above which a request is refused."""
        return self._options.low_priority_threshold_s if band is Band.LOW else self._slo.ttft_s

    def _look(self, expected: Expectation | None, band: Band) -> Look | None:
        if expected is None:
            return None
        tpot_limit_s = None if band is Band.LOW else self._tpot_s
        pressure = self._pressure(expected, band)
        return Look(band, expected.ttft_s, self._limit_s(band), expected.tpot_s, tpot_limit_s, pressure)

    def _pressure(self, expected: Expectation, band: Band) -> float:
        ttft = expected.ttft_s / self._limit_s(band)
        return ttft if band is Band.LOW else max(ttft, expected.tpot_s / self._tpot_s)

    def _relieved_by(self, step: DegradeStep, expected: Expectation, band: Band) -> float:
        """The pressure that a step can do something about. What fewer samples and shorter answers free are
        rows, and time of the workers that decode them."""
        if step.lower != "model":
            expected = replace(expected, ttft_s=expected.ttft_s - expected.elsewhere_s, elsewhere_s=0.0)
        return self._pressure(expected, band)

    def _refuses(self, expected: Expectation, band: Band) -> bool:
        if not self._options.early_rejection:
            return False
        if band is Band.NORMAL and not self._options.reject_on_slo_violation:
            return False
        if expected.untried:
            return False  # who is refused teaches nobody how fast that worker is
        return self._pressure(expected, band) > 1.0

    def _refusal(self, expected: Expectation, band: Band) -> WouldWait:
        limit_s = self._limit_s(band)
        late = expected.ttft_s > limit_s
        name = "the first token" if late else "each further token"
        found_s, most_s = (expected.ttft_s, limit_s) if late else (expected.tpot_s, self._tpot_s)
        too_long = expected.own_s > limit_s
        eases_s = 0.0 if band is Band.LOW else expected.eases_in_s(self._tpot_s)
        again_s = retry_after_s(math.inf if too_long else max(expected.ttft_s - limit_s, eases_s))
        alone = f", of which its own prompts take {expected.own_s * 1e3:.0f} ms" if too_long else ""
        if not late and math.isinf(eases_s):
            alone = ", even with nobody else served"
        return WouldWait(
            Slo.TTFT if late else Slo.TPOT,
            f"{name} would take about {found_s * 1e3:.0f} ms{alone}, and a request of {band} priority is "
            f"accepted up to {most_s * 1e3:.0f} ms; try again in {again_s} s",
            retry_after_s=again_s,
        )


def _lowered(request: GenerateRequest, step: DegradeStep) -> GenerateRequest:
    sampling = request.sampling
    if step.to is None or getattr(sampling, step.lower) <= step.to:
        return request
    changes: dict[str, int] = {step.lower: step.to}
    if step.lower == "max_tokens":
        changes["min_tokens"] = min(sampling.min_tokens, step.to)
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, **changes))


def check_servable(members: Iterable[Member], requests: Sequence[GenerateRequest]) -> None:
    """Raise RequestRefused where these workers, of one model, can never take all of the requests together:
    INVALID for too many, UNAVAILABLE when all workers that decode are on their way out."""
    homes = [member for member in members if member.info.role.decodes]
    wanted = sum(request.sampling.n for request in requests)
    most = sum(member.most_samples for member in homes)
    if wanted > most:
        message = f"{wanted} sequences are asked for at once, and the engine takes {most} at most"
        raise RequestRefused(ErrorCode.INVALID, message, "n")
    if homes and not any(member.takes_more for member in homes):
        message = "all workers that decode are shutting down; try again later"
        raise RequestRefused(ErrorCode.UNAVAILABLE, message)
    together = max((request.sampling.n for request in requests), default=0)
    widest = max((member.most_samples for member in homes), default=0)
    if together > widest:
        message = f"{together} sequences are asked for of one prompt, and a worker takes {widest} at most"
        raise RequestRefused(ErrorCode.INVALID, message, "n")


def check_room(requests: Sequence[GenerateRequest], backlog: Backlog, open_samples: int, most: int) -> None:
    """Raise RequestRefused, OVERLOADED, where there is no room for all of the requests beside those that wait
    and do not make way for them. So the workers' queues together bound the gateway's. The client is told
    `open_samples`, and how many there may be at `most`."""
    model, wanted = requests[0].model, sum(request.sampling.n for request in requests)
    if not backlog.takes(requests):
        seconds = backlog.frees_in_s(model, wanted - backlog.room(model))
        again_s = retry_after_s(seconds)
        raise RequestRefused(
            ErrorCode.OVERLOADED,
            f"{open_samples} sequences run or wait, {wanted} more are asked for, and the limit is {most}; at "
            f"the present pace there is room in {about(seconds)}: try again in {again_s} s",
            retry_after_s=again_s,
        )
