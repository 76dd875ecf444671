"""The metrics of a server, in a registry of its own.

In: what the gateway observes. Out: the text that Prometheus reads. Names and buckets follow vLLM's with
another prefix, so that dashboards carry over; what vLLM has no name for is named in the same manner.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from headrace.cluster.gateway import GatewayObserver
from headrace.protocol.messages import StepStats
from headrace.protocol.requests import FinishReason

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_E2E_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_NO_TOTALS = (0, 0, 0, 0)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics(GatewayObserver):
    """Metrics of one served model. Times in seconds."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._running = self._gauge("num_requests_running", "Sequences that the engine computes.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for their first step.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks that are held; 1 is all.")
        self._held_tokens = self._gauge("kv_cache_held_tokens", "Positions that held KV blocks carry.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._preemptions = self._counter("num_preemptions", "Sequences that gave up their blocks.")
        self._evictions = self._counter("kv_cache_evictions", "Cached blocks that were given to others.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that have ended.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens sampled.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From request to first token.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "From one token to the next.", _TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From request to its ending.", _E2E_S)
        self._step = self._histogram("step_seconds", "One step of the engine.", _STEP_S)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens in one step.", _STEP_TOKENS)
        self._kernel_s = self._counter("kernel_seconds", "Time of steps that was spent in kernels.")
        finished = Counter(
            "headrace:request_success",
            "Sequences that have ended, by how.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._finished = {reason: finished.labels(model, reason.value) for reason in FinishReason}
        self._last_totals = _NO_TOTALS
        self._last_step = 0

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    # ---- what the gateway observes -------------------------------------------------------------------

    def step(self, stats: StepStats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        total = stats.blocks_free + stats.blocks_cached + stats.blocks_held
        self._usage.set(stats.blocks_held / total)
        self._held_tokens.set(stats.held_tokens)
        self._count_totals(stats)
        if stats.rows:
            self._generation_tokens.inc(stats.sampled)
            self._step.observe(stats.step_s)
            self._step_tokens.observe(stats.tokens)
            self._kernel_s.inc(stats.kernel_s)

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        for _ in range(tokens):
            self._itl.observe(gap_s / tokens)

    def ended(self, reason: FinishReason, prompt_tokens: int, output_tokens: int, e2e_s: float) -> None:
        self._finished[reason].inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._e2e.observe(e2e_s)

    def _count_totals(self, stats: StepStats) -> None:
        """Add what has come to the engine's totals; they and its steps begin at 0 when it starts again."""
        if stats.step < self._last_step:
            self._last_totals = _NO_TOTALS
        self._last_step = stats.step
        totals = (stats.prefix_queries, stats.prefix_hits, stats.preemptions, stats.evictions)
        if totals == self._last_totals:
            return
        counters = (self._prefix_queries, self._prefix_hits, self._preemptions, self._evictions)
        for counter, total, last in zip(counters, totals, self._last_totals, strict=True):
            counter.inc(total - last)
        self._last_totals = totals

    # ---- making them ---------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"headrace:{name}", text, ["model_name"], registry=self._registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"headrace:{name}", text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"headrace:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        ).labels(self._model)
