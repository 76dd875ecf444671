"""The metrics of a server: what is measured, under which name, and what moves it.

In: what the gateway observes. Out: the text that Prometheus reads. Names, meanings and buckets are vLLM's
with another prefix, so that dashboards carry over; what vLLM has no name for is named in the same manner.
`docs/metrics.md` describes each for those who read them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.cluster import Ending, GatewayObserver
from headrace.cluster.classes import Band, Refusal, Slo
from headrace.cluster.options import GatewayOptions
from headrace.cluster.registry import MemberState
from headrace.observe.instruments import (
    Counter,
    CounterBy,
    Gauge,
    GaugeBy,
    Histogram,
    HistogramBy,
    Info,
    Instrument,
)
from headrace.observe.service_levels import WINDOWS, Attainment, ServiceRecord
from headrace.protocol.handoff import Cause
from headrace.protocol.messages import EngineInfo, ImportSettled, Role, StepStats, WorkerInfo
from headrace.protocol.requests import FinishReason, GenerateRequest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "headrace:"

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 10, 20, 40, 80),
)
_REQUEST_S = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920),
)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
_SAMPLES = (1, 2, 5, 10, 20)

_FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",  # vLLM's word
    FinishReason.ERROR: "error",
}
_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
TRANSFERRED = "transferred"
_MET = {True: "true", False: "false"}
_THERE = [state for state in MemberState if state is not MemberState.DOWN]
_Totals = tuple[int, int, int, int]
GONE_KEPT = 1000
"""Of so many workers that went, what was counted of them is remembered: one whose connection was lost may
dial in again with the same engine, whose totals go on."""

_Instrument = TypeVar("_Instrument", bound=Instrument)


@dataclass(slots=True)
class _Counted:
    """What of an engine's totals is in the counters."""

    generation: int
    totals: _Totals = (0, 0, 0, 0)


class Metrics(GatewayObserver, Collector):
    """Metrics of one served model. Times in seconds."""

    def __init__(self, model: str, now: Callable[[], float], options: GatewayOptions | None = None) -> None:
        """`now` is the clock of the gateway's world, in seconds; `options` are the gateway's."""
        options = options or GatewayOptions()
        self._labels = {"model_name": model}
        self._all: list[Instrument] = []
        add = self._add

        self._running = add(Gauge("num_requests_running", "Sequences that the engine computes."))
        self._waiting = add(Gauge("num_requests_waiting", "Sequences that wait for their first step."))
        self._usage = add(Gauge("kv_cache_usage_perc", "Share of KV blocks that are held; 1 is all."))
        self._held_tokens = add(Gauge("kv_cache_held_tokens", "Positions that held KV blocks carry."))
        self._efficiency = add(
            Gauge("kv_cache_efficiency_perc", "Share of the positions of held KV blocks that carry a token.")
        )
        self._up = add(Gauge("engine_up", "Engines that are connected."))
        self._workers = add(
            GaugeBy("workers", "Workers that are there, by role and state.", {"role": Role, "state": _THERE})
        )
        self._suspected = add(
            CounterBy("workers_suspected", "How often a worker fell silent, by role.", {"role": Role})
        )
        self._weight_bytes = add(Gauge("model_weight_bytes", "Size of the weights in the precision served."))
        self._kv_bytes = add(Gauge("kv_cache_bytes", "Size of the KV cache."))

        self._prefix_queries = add(Counter("prefix_cache_queries", "Prompt tokens looked up in the cache."))
        self._prefix_hits = add(Counter("prefix_cache_hits", "Prompt tokens found in the cache."))
        self._preemptions = add(Counter("num_preemptions", "Sequences that gave up their blocks."))
        self._evictions = add(Counter("kv_cache_evictions", "Cached blocks that were given to others."))
        self._prompt_tokens = add(Counter("prompt_tokens", "Prompt tokens whose prefill is done."))
        self._generation_tokens = add(Counter("generation_tokens", "Tokens generated."))
        self._finished = add(
            CounterBy(
                "request_success",
                "Sequences that have ended, by how.",
                {"finished_reason": _FINISHED.values()},
            )
        )
        self._refused = add(
            CounterBy(
                "request_refused",
                "Requests that were not accepted, by class and why.",
                {"class": Band, "reason": Refusal},
            )
        )
        smaller = {one.smaller for one in options.models} | {one.smaller for one in options.aliases}
        taken = (step for step in options.admission.degrade if step.lower != "model" or model in smaller)
        self._gateway_queue = add(
            GaugeBy("gateway_queue_requests", "Requests that wait at the gateway, by class.", {"class": Band})
        )
        self._gateway_wait = add(
            HistogramBy(
                "gateway_queue_seconds",
                "How long requests waited at the gateway that a worker got then, by class.",
                _REQUEST_S,
                "class",
                Band,
            )
        )
        ladder = dict.fromkeys(step.in_words(model) for step in taken)
        self._degraded = add(
            CounterBy(
                "request_degraded",
                "Requests that were accepted with less than was asked for, by class and what was lowered.",
                {"class": Band, "step": ladder},
            )
        )
        self._replays = add(
            Counter("request_replays", "Requests that went on at another worker after theirs was lost.")
        )
        self._handoffs = add(
            CounterBy(
                "kv_transfers",
                "Transfers of a prompt's KV blocks between workers, by how they ended.",
                {"outcome": [TRANSFERRED, *Cause]},
            )
        )
        self._moved_bytes = add(Counter("kv_transfer_bytes", "KV bytes fetched from other workers."))
        self._engine_starts = add(Counter("engine_starts", "Engines that came to serve, one after another."))
        self._busy_s = add(Counter("engine_busy_seconds", "Time that the engine spent in steps."))
        self._kernel_s = add(Counter("kernel_seconds", "Time of steps that was spent in kernels."))

        self._ttft = add(Histogram("time_to_first_token_seconds", "From request to first token.", _TTFT_S))
        self._record = ServiceRecord(options, now)
        levels: dict[str, Iterable[str]] = {"class": Band, "slo": Slo}
        self._judged = add(
            CounterBy(
                "slo_requests",
                "Requests and sequences by whether they got what their class may expect.",
                {**levels, "met": _MET.values()},
            )
        )
        self._limits = add(GaugeBy("slo_limit_seconds", "What requests of a class may expect.", levels))
        for (band, slo), limit_s in self._record.limits_s.items():
            self._limits.values[band, slo] = limit_s
        self._objective = add(Gauge("slo_objective_ratio", "The share of requests that should get it."))
        self._objective.value = self._record.objective
        over = {**levels, "window": WINDOWS}
        self._attained = add(
            GaugeBy("slo_attainment_ratio", "The share that got it, over a window; 1 without any.", over)
        )
        self._burn = add(
            GaugeBy("slo_burn_rate", "How fast the error budget is spent; 1 is as fast as may be.", over)
        )

        self._itl = add(Histogram("inter_token_latency_seconds", "From one token to the next.", _TOKEN_S))
        self._tpot = add(
            Histogram(
                "request_time_per_output_token_seconds",
                "Mean over a sequence's tokens after the first.",
                _TOKEN_S,
            )
        )
        self._e2e = add(Histogram("e2e_request_latency_seconds", "From request to its ending.", _REQUEST_S))
        self._queue = add(
            Histogram("request_queue_time_seconds", "From the engine's inbox to the first step.", _REQUEST_S)
        )
        self._prefill = add(
            Histogram("request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_S)
        )
        self._decode = add(
            Histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST_S)
        )
        self._inference = add(
            Histogram("request_inference_time_seconds", "From the first step to the last token.", _REQUEST_S)
        )
        self._request_prompt = add(Histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS))
        self._request_output = add(Histogram("request_generation_tokens", "Tokens of a sequence.", _TOKENS))
        self._params_n = add(Histogram("request_params_n", "Samples that a request asks for.", _SAMPLES))
        self._params_max_tokens = add(
            Histogram("request_params_max_tokens", "Tokens that a request asks for at most.", _TOKENS)
        )
        self._moved_s = add(
            Histogram("kv_transfer_seconds", "From a prompt's first block to the confirmation.", _STEP_S)
        )
        self._step_tokens = add(Histogram("iteration_tokens_total", "Tokens in one step.", _STEP_TOKENS))
        self._step_s = add(Histogram("step_seconds", "One step of the engine.", _STEP_S))
        self._overhead_s = add(
            Histogram("step_overhead_seconds", "The part of a step that is not a kernel.", _OVERHEAD_S)
        )

        add(Info("build_info", "What runs.", {"version": __version__}))
        self._model_info = add(Info("model_info", "What the engine serves and how it computes."))
        self._cache_info = add(Info("cache_config_info", "How the KV cache is cut."))
        self._efficiency.value = 1.0
        self._states: dict[str, tuple[str, str]] = {}  # role and state of each worker
        self._counted: dict[str, _Counted] = {}
        self._gone: OrderedDict[str, _Counted] = OrderedDict()  # they may come back as they were
        self._last_stats: dict[str, StepStats] = {}
        self._infos: dict[str, EngineInfo] = {}

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now."""
        self._sum_up()
        for one in self._record.attainment():
            over = one.band, one.slo, one.window
            self._attained.values[over] = 1.0 if one.ratio is None else one.ratio
            self._burn.values[over] = one.burn_rate or 0.0
        for instrument in self._all:
            yield instrument.family(self._labels)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self)

    def attainment(self) -> list[Attainment]:
        """Which share of requests got what their class may expect, by class, limit and window."""
        return list(self._record.attainment())

    def _add(self, instrument: _Instrument) -> _Instrument:
        instrument.name = PREFIX + instrument.name
        self._all.append(instrument)
        return instrument

    # ---- what the gateway observes -------------------------------------------------------------------

    def engine_up(self, worker: WorkerInfo) -> None:
        worker_id, info = worker.worker_id, worker.engine
        known = self._gone.pop(worker_id, None) or self._counted.get(worker_id)
        if known is not None and known.generation == worker.generation:
            self._counted[worker_id] = known
        else:
            self._engine_starts.value += 1
            self._counted[worker_id] = _Counted(worker.generation)  # an engine counts from 0
        self._infos[worker_id] = info
        self.worker_became(worker, MemberState.UP)
        self._model_info.facts = {
            "revision": info.revision,
            "dtype": info.dtype,
            "numerics": info.numerics,
            "batch_invariant": str(info.batch_invariant).lower(),
            "max_model_len": str(info.max_model_len),
            "max_num_seqs": str(info.max_num_seqs),
            "max_num_batched_tokens": str(info.max_num_batched_tokens),
            "threads": str(info.threads),
        }
        self._cache_info.facts = {
            "block_size": str(info.block_size),
            "num_blocks": str(info.num_blocks),
            "block_bytes": str(info.block_bytes),
            "enable_prefix_caching": str(info.prefix_caching).lower(),
        }

    def engine_lost(self, worker_id: str) -> None:
        """Nothing runs, waits or is held where there is no engine."""
        if (was := self._states.pop(worker_id, None)) is not None:
            self._workers.values[was] -= 1
        self._infos.pop(worker_id, None)
        self._last_stats.pop(worker_id, None)
        if (counted := self._counted.pop(worker_id, None)) is not None:
            self._gone[worker_id] = counted
            if len(self._gone) > GONE_KEPT:
                self._gone.popitem(last=False)

    def worker_became(self, worker: WorkerInfo, state: MemberState) -> None:
        if (was := self._states.pop(worker.worker_id, None)) is not None:
            self._workers.values[was] -= 1
        if state is not MemberState.DOWN:
            self._states[worker.worker_id] = worker.role, state
            self._workers.values[worker.role, state] += 1
        if state is MemberState.SUSPECT:
            self._suspected.values[worker.role,] += 1

    def step(self, worker_id: str, stats: StepStats) -> None:
        if worker_id not in self._counted:
            return  # it is gone, and this was on its way
        self._last_stats[worker_id] = stats
        self._count_totals(worker_id, stats)
        if stats.rows:
            self._busy_s.value += stats.step_s
            self._kernel_s.value += stats.kernel_s
            self._step_s.observe(stats.step_s)
            self._overhead_s.observe(stats.step_s - stats.kernel_s)
            self._step_tokens.observe(stats.tokens)

    def replayed(self, request: GenerateRequest) -> None:
        self._replays.value += 1

    def handed_over(self, request: GenerateRequest, settled: ImportSettled) -> None:
        self._handoffs.values[settled.cause or TRANSFERRED,] += 1
        if settled.imported:
            self._moved_bytes.value += settled.bytes_moved
            self._moved_s.observe(settled.move_s)

    def _sum_up(self) -> None:
        """The gauges are sums over all engines that are there."""
        stats, infos = self._last_stats.values(), self._infos.values()
        self._up.value = float(len(self._infos))
        self._weight_bytes.value = sum(info.weight_bytes for info in infos)
        self._kv_bytes.value = sum(info.num_blocks * info.block_bytes for info in infos)
        self._running.value = sum(one.running for one in stats)
        self._waiting.value = sum(one.waiting for one in stats)
        held = sum(one.blocks_held for one in stats)
        total = sum(info.num_blocks for info in infos)
        held_tokens = sum(one.held_tokens for one in stats)
        self._usage.value = held / total if total else 0.0
        self._held_tokens.value = held_tokens
        block_size = max((info.block_size for info in infos), default=1)  # the same in a whole cluster
        self._efficiency.value = held_tokens / (held * block_size) if held else 1.0

    def queued(self, request: GenerateRequest) -> None:
        self._gateway_queue.values[Band.of(request.priority),] += 1

    def unqueued(self, request: GenerateRequest, waited_s: float | None) -> None:
        band = Band.of(request.priority)
        self._gateway_queue.values[band,] -= 1
        if waited_s is not None:
            self._gateway_wait.each[band].observe(waited_s)

    def accepted(self, request: GenerateRequest) -> None:
        self._request_prompt.observe(len(request.prompt))
        self._params_n.observe(request.sampling.n)
        self._params_max_tokens.observe(request.sampling.max_tokens)

    def refused(self, request: GenerateRequest, why: Refusal) -> None:
        self._refused.values[Band.of(request.priority), why] += 1

    def degraded(self, request: GenerateRequest, steps: Collection[str]) -> None:
        for step in steps:
            self._degraded.values[Band.of(request.priority), step] += 1

    def answered(self, request: GenerateRequest, ttft_s: float | None) -> None:
        self._judge(Band.of(request.priority), Slo.TTFT, ttft_s)

    def gave_up(self, request: GenerateRequest, after_s: float) -> None:
        """Who waited for as long as it may expect to, and got nothing, did not get what it may expect."""
        band = Band.of(request.priority)
        if after_s > self._record.limits_s[band, Slo.TTFT]:
            self._judge(band, Slo.TTFT, None)

    def _judge(self, band: Band, slo: Slo, took_s: float | None) -> None:
        met = self._record.judge(band, slo, took_s)
        self._judged.values[band, slo, _MET[met]] += 1

    def first_tokens(self, request: GenerateRequest, ttft_s: float, tokens: int, prompt_tokens: int) -> None:
        self._ttft.observe(ttft_s)
        self._generation_tokens.value += tokens
        self._prompt_tokens.value += prompt_tokens

    def next_tokens(self, request: GenerateRequest, gap_s: float, tokens: int) -> None:
        self._itl.observe(gap_s / tokens, tokens)
        self._generation_tokens.value += tokens

    def ended(self, ending: Ending) -> None:
        self._finished.values[_FINISHED[ending.reason],] += 1
        failed = ending.reason is FinishReason.ERROR
        if failed or (ending.reason in _COMPLETE and ending.tpot_s is not None):
            took_s = None if failed else ending.tpot_s
            self._judge(Band.of(ending.request.priority), Slo.TPOT, took_s)
        self._e2e.observe(ending.e2e_s)
        self._request_output.observe(ending.output_tokens)
        if (times := ending.times) is None or times.queue_s is None:
            return
        self._queue.observe(times.queue_s)
        if times.prefill_s is None:
            return
        self._prefill.observe(times.prefill_s)
        if times.decode_s is not None and ending.reason in _COMPLETE:
            self._decode.observe(times.decode_s)
            self._inference.observe(times.prefill_s + times.decode_s)
            if ending.output_tokens > 1:
                self._tpot.observe(times.decode_s / (ending.output_tokens - 1))

    def _count_totals(self, worker_id: str, stats: StepStats) -> None:
        """Add what has come to an engine's totals."""
        totals = (stats.prefix_queries, stats.prefix_hits, stats.preemptions, stats.evictions)
        counted = self._counted[worker_id]
        before = counted.totals
        if totals == before:
            return
        counters = (self._prefix_queries, self._prefix_hits, self._preemptions, self._evictions)
        for counter, total, last in zip(counters, totals, before, strict=True):
            counter.value += total - last
        counted.totals = totals
