"""What a request would have to wait, foreseen before it is accepted.

In: a request. Out: TTFT and TPOT where it would go now; None where nothing can be foreseen, as no worker is
there. Two ways: by what routing knows of each worker, or by the rule of thumb of queue lengths and averages,
which is here to be compared with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from headrace.cluster.backlog import Backlog
from headrace.cluster.classes import Expectation
from headrace.cluster.dispatch import Dispatch
from headrace.cluster.registry import Member, Registry
from headrace.protocol.requests import GenerateRequest


class Foresight(ABC):
    """How waits are foreseen."""

    @abstractmethod
    def expect(self, requests: Sequence[GenerateRequest]) -> Expectation | None:
        """What these requests of one call would find now: the last of them, for one is computed after the
        other, and beside all of them."""


class Predictive(Foresight):
    """After what waits at the gateway before it, where it would be served soonest: the fitted model of that
    worker, its queue, and what will decode beside it when its prefill ends."""

    def __init__(self, dispatch: Dispatch, backlog: Backlog) -> None:
        self._dispatch = dispatch
        self._backlog = backlog

    def expect(self, requests: Sequence[GenerateRequest]) -> Expectation | None:
        *others, last = sorted(requests, key=lambda request: len(request.prompt))
        if not self._backlog.takes(requests):
            return None
        return self._dispatch.foresee(last, self._backlog.ahead(last, others))


class Naive(Foresight):
    """Requests that wait for a prefill times what one takes on average, and those at workers that decode
    times what an answer takes of its worker: as many are decoded at once as there are rows, so that is its
    duration over these. Numbers are those that workers told last."""

    def __init__(self, registry: Registry, backlog: Backlog) -> None:
        self._registry = registry
        self._backlog = backlog

    def expect(self, requests: Sequence[GenerateRequest]) -> Expectation | None:
        model, others = requests[0].model, len(requests) - 1
        live = [member for member in self._registry.live(model) if member.stats is not None]
        if not live:
            return None
        prefill = [m for m in live if not m.info.role.decodes] or live
        decode = [m for m in live if m.info.role.decodes]
        waiting = (self._backlog.requests(model) + others) / len(prefill)
        ttft_s = _mean([(_waiting(m) + waiting) * m.prefill_s for m in prefill])
        ttft_s += _mean([_there(m) * m.decode_s / m.info.engine.max_num_seqs for m in decode])
        tpot_s = _mean([m.stats.step_s for m in decode if m.stats is not None])
        beside, lasts_s = _mean([_there(m) for m in decode]), _mean([m.decode_s for m in decode])
        return Expectation(ttft_s, tpot_s, beside=beside, row_s=tpot_s / max(beside, 1.0), lasts_s=lasts_s)


def _waiting(member: Member) -> int:
    return member.stats.waiting if member.stats is not None else 0


def _there(member: Member) -> int:
    """Those that run or wait."""
    return member.stats.running + member.stats.waiting if member.stats is not None else 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
