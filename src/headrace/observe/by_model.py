"""The metrics of a server of several models: each has its own, with its name in their label.

In: what the gateway observes, of any model. Out: one page, on which a metric's samples of all models stand
together, as Prometheus wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from headrace.cluster import Ending, GatewayObserver
from headrace.cluster.classes import Refusal
from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import MemberState
from headrace.observe.metrics import Metrics
from headrace.observe.service_levels import Attainment, together
from headrace.protocol.messages import ImportSettled, StepStats, WorkerInfo
from headrace.protocol.requests import GenerateRequest


class MetricsByModel(GatewayObserver, Collector):
    """Of those models that `options` name."""

    def __init__(self, now: Callable[[], float], options: GatewayOptions) -> None:
        """`now` is the clock of the gateway's world, in seconds."""
        self._of: Mapping[str, Metrics] = {
            model.name: Metrics(model.name, now, options) for model in options.models
        }
        self._workers: dict[str, Metrics] = {}  # where what a worker does is counted

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now."""
        for first, *others in zip(*(metrics.collect() for metrics in self._of.values()), strict=True):
            first.samples += chain.from_iterable(other.samples for other in others)
            yield first

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self)

    def attainment(self) -> list[Attainment]:
        """Which share of requests, to whichever model, got what their class may expect."""
        return together([metrics.attainment() for metrics in self._of.values()])

    # ---- what the gateway observes -------------------------------------------------------------------

    def engine_up(self, worker: WorkerInfo) -> None:
        metrics = self._of[worker.engine.model]
        former = self._workers.get(worker.worker_id)
        if former is not None and former is not metrics:
            former.engine_lost(worker.worker_id)
        self._workers[worker.worker_id] = metrics
        metrics.engine_up(worker)

    def engine_lost(self, worker_id: str) -> None:
        self._workers.pop(worker_id).engine_lost(worker_id)

    def worker_became(self, worker: WorkerInfo, state: MemberState) -> None:
        self._of[worker.engine.model].worker_became(worker, state)

    def step(self, worker_id: str, stats: StepStats) -> None:
        if worker_id in self._workers:  # else it is gone, and this was on its way
            self._workers[worker_id].step(worker_id, stats)

    def replayed(self, request: GenerateRequest) -> None:
        self._of[request.model].replayed(request)

    def handed_over(self, request: GenerateRequest, settled: ImportSettled) -> None:
        self._of[request.model].handed_over(request, settled)

    def queued(self, request: GenerateRequest) -> None:
        self._of[request.model].queued(request)

    def unqueued(self, request: GenerateRequest, waited_s: float | None) -> None:
        self._of[request.model].unqueued(request, waited_s)

    def accepted(self, request: GenerateRequest) -> None:
        self._of[request.model].accepted(request)

    def refused(self, request: GenerateRequest, why: Refusal) -> None:
        self._of[request.model].refused(request, why)

    def degraded(self, request: GenerateRequest, steps: Collection[str]) -> None:
        self._of[request.model].degraded(request, steps)

    def answered(self, request: GenerateRequest, ttft_s: float | None) -> None:
        self._of[request.model].answered(request, ttft_s)

    def gave_up(self, request: GenerateRequest, after_s: float) -> None:
        self._of[request.model].gave_up(request, after_s)

    def first_tokens(self, request: GenerateRequest, ttft_s: float, tokens: int, prompt_tokens: int) -> None:
        self._of[request.model].first_tokens(request, ttft_s, tokens, prompt_tokens)

    def next_tokens(self, request: GenerateRequest, gap_s: float, tokens: int) -> None:
        self._of[request.model].next_tokens(request, gap_s, tokens)

    def ended(self, ending: Ending) -> None:
        self._of[ending.request.model].ended(ending)
