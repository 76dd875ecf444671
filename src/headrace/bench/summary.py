"""What a run's records come to: latencies, throughput, goodput, errors, and what the generator itself cost.

In: records. Out: one typed summary, which the report prints and JSON holds. Latencies and tokens are those
of completed requests; of those that the end of the run cut off, what had come until then counts as well
(first token, gaps, tokens), but no latency of the whole. Failed requests are counted by kind. Percentiles
interpolate linearly between ranks, as numpy's do by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from headrace.bench.errors import BenchError, FailureKind
from headrace.bench.record import Counted, Record

_UNITS_S = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_LATENCY = re.compile(r"(\d+(?:\.\d*)?)\s*(us|µs|ms|s)")


class Distribution(msgspec.Struct, frozen=True):
    """Of some number of values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: ArrayLike) -> Distribution | None:
        """None for no values."""
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0:
            return None
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99)).tolist()
        return cls(array.size, float(array.mean()), p50, p90, p95, p99, float(array.max()))


@dataclass(frozen=True, slots=True)
class Objectives:
    """Upper bounds that a good request keeps, in seconds."""

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """From `ttft=200ms,tpot=50ms,e2e=10s`. Raises BenchError."""
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            match = _LATENCY.fullmatch(value)
            if name not in cls.__slots__ or match is None or name in bounds:
                raise BenchError(
                    f"{part.strip()!r} in the SLO {text!r}: expected is ttft, tpot or e2e, once each, with "
                    "a time and its unit, such as ttft=200ms,tpot=50ms"
                )
            bounds[name] = float(match[1]) * _UNITS_S[match[2]]
        return cls(**bounds)

    def met_by(self, record: Record) -> bool:
        """Whether a request was completed within all bounds; a latency that it does not have is within."""
        return record.completed and all(
            value is None or value <= bound
            for value, bound in (
                (record.ttft_s, self.ttft),
                (record.tpot_s, self.tpot),
                (record.e2e_s, self.e2e),
            )
        )


class Errors(msgspec.Struct, frozen=True):
    """Requests that failed in one way."""

    count: int
    example: str


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met the objectives, of all but those cancelled by the end of the run."""

    objectives_s: dict[str, float]
    good: int
    share: float
    requests_per_s: float


class GeneratorCost(msgspec.Struct, frozen=True):
    """What the generator took for itself, and how late it was."""

    cpu_s: float
    core_share: float
    """Of one core over the run."""
    cpu_per_request_s: float
    cpu_per_chunk_s: float
    """All of its processor time over all chunks of all requests."""
    lag_s: Distribution | None
    """Between when a request should have been handed to the socket and when it was; None in one process."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in figures. Times in seconds, lengths in tokens."""

    target: str
    workload: str
    load: str
    seed: int
    date: str
    """When the run began: ISO 8601."""
    duration_s: float
    """From the first request due to the last answer."""
    interrupted: bool
    sent: int
    completed: int
    failed: int
    cancelled: int
    unsent: int
    """Turns given up because an earlier turn of their session failed or the time was over."""
    short: int
    """Completed requests with fewer tokens than were asked for."""
    errors: dict[str, Errors]
    input_tokens: int
    cached_tokens: int | None
    """Input tokens that the server says it found in its cache; None where it does not say."""
    output_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    mean_running: float
    most_running: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    held_back_s: Distribution | None
    """Between when requests were due and when the limit on concurrency let them go; None without a
    schedule.
    """
    tokens_per_chunk: Distribution | None
    chunks_counted_by: dict[Counted, int]
    """How many requests' chunks were counted in which way."""
    goodput: Goodput | None
    generator: GeneratorCost
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Context:
    """What a summary says of a run beside its records."""

    target: str
    workload: str
    load: str
    seed: int
    date: str
    scheduled: bool
    """Whether requests were due at times of their own."""
    sends: bool = True
    """Whether sending can be late; see `Target.sends`."""
    objectives: Objectives | None = None


def summarise(
    records: Iterable[Record],
    context: Context,
    *,
    duration_s: float,
    cpu_s: float,
    most_running: int,
    unsent: int = 0,
    interrupted: bool = False,
    notes: Sequence[str] = (),
) -> Summary:
    """Figures over `records`; `duration_s` and `cpu_s` are the run's."""
    records = [record for record in records if record.ended_s is not None]
    done = [record for record in records if record.completed]
    cancelled = [r for r in records if r.failure is not None and r.failure.kind == FailureKind.CANCELLED]
    measured = done + [record for record in cancelled if record.times]
    itl = [record.itl_s() for record in measured]
    chunks = sum(len(record.times) for record in records)
    output_tokens = sum(record.output_tokens for record in measured)
    input_tokens = sum(record.input_tokens or 0 for record in done)
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    busy_s = sum(r.ended_s - r.sent_s for r in records if r.ended_s is not None and r.sent_s is not None)
    counted = {kind: sum(record.counted is kind for record in measured) for kind in Counted}
    return Summary(
        target=context.target,
        workload=context.workload,
        load=context.load,
        seed=context.seed,
        date=context.date,
        duration_s=duration_s,
        interrupted=interrupted,
        sent=len(records),
        completed=len(done),
        failed=len(records) - len(done) - len(cancelled),
        cancelled=len(cancelled),
        unsent=unsent,
        short=sum(r.asked_tokens is not None and r.output_tokens < r.asked_tokens for r in done),
        errors=_errors(records),
        input_tokens=input_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        requests_per_s=_per(len(done), duration_s),
        input_tokens_per_s=_per(input_tokens, duration_s),
        output_tokens_per_s=_per(output_tokens, duration_s),
        mean_running=_per(busy_s, duration_s),
        most_running=most_running,
        ttft_s=_distribution(record.ttft_s for record in measured),
        tpot_s=_distribution(record.tpot_s for record in done),
        itl_s=Distribution.of(np.concatenate(itl)) if itl else None,
        e2e_s=_distribution(record.e2e_s for record in done),
        held_back_s=_distribution(r.ready_s - r.due_s for r in records) if context.scheduled else None,
        tokens_per_chunk=Distribution.of([size for record in measured for size in record.sizes]),
        chunks_counted_by={kind: number for kind, number in counted.items() if number},
        goodput=_goodput(records, len(cancelled), context.objectives, duration_s),
        generator=GeneratorCost(
            cpu_s=cpu_s,
            core_share=_per(cpu_s, duration_s),
            cpu_per_request_s=_per(cpu_s, len(records)),
            cpu_per_chunk_s=_per(cpu_s, chunks),
            lag_s=_distribution(record.lag_s for record in records) if context.sends else None,
        ),
        notes=list(notes),
    )


def _per(amount: float, over: float) -> float:
    return amount / over if over > 0 else 0.0


def _distribution(values: Iterable[float | None]) -> Distribution | None:
    return Distribution.of([value for value in values if value is not None])


def _errors(records: Sequence[Record]) -> dict[str, Errors]:
    found: dict[str, list[str]] = {}
    for record in records:
        if record.failure is not None:
            found.setdefault(record.failure.kind, []).append(record.failure.message)
    return {kind: Errors(len(messages), messages[0]) for kind, messages in sorted(found.items())}


def _goodput(
    records: Sequence[Record], cancelled: int, objectives: Objectives | None, duration_s: float
) -> Goodput | None:
    if objectives is None:
        return None
    good = sum(objectives.met_by(record) for record in records)
    bounds: Mapping[str, float] = {name: getattr(objectives, name) for name in ("ttft", "tpot", "e2e")}
    return Goodput(
        objectives_s={name: bound for name, bound in bounds.items() if bound < math.inf},
        good=good,
        share=_per(good, len(records) - cancelled),
        requests_per_s=_per(good, duration_s),
    )
