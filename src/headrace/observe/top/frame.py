"""What one frame shows: numbers, from readings of a server at different times.

In: readings, newest last. Out: a `Frame`. Rates and percentiles are of the time between the oldest reading
that is kept and the newest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.observe.top.reading import Distribution, Reading

WINDOW_S = 60.0
RATE_S = 5.0
"""Rates are of so much time, for people see a change sooner than a percentile can be told."""
TRANSFERRED = "transferred"
ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True)
class Worker:
    name: str
    role: str
    state: str
    why: str
    running: int
    waiting: int
    open: int
    """Sequences that it has from this gateway and that have not ended."""
    prefills: int
    """Prompts that it prefills for others."""
    usage: float
    """Share of its KV blocks that are held."""
    leased: float
    """Share that waits to be fetched by others."""
    hit_rate: float | None
    """Share of prompt tokens found in its prefix cache; None where nothing was looked up."""
    step_s: float | None
    steps: int
    heard_s_ago: float


@dataclass(frozen=True, slots=True)
class Level:
    """What one class may expect of one of the times that have an SLO, and what it got."""

    band: str
    limit_s: float
    met: int
    judged: int

    @property
    def within(self) -> float | None:
        """The share that got it; None where nothing was judged."""
        return _share(self.met, self.judged)


@dataclass(frozen=True, slots=True)
class Latency:
    """One of the times that have an SLO."""

    p50_s: float | None
    p99_s: float | None
    count: int
    levels: tuple[Level, ...]
    """Of each class, the most urgent first."""

    @property
    def slo_s(self) -> float | None:
        """The strictest of the classes' limits."""
        return min((level.limit_s for level in self.levels), default=None)


@dataclass(frozen=True, slots=True)
class Frame:
    model: str
    state: str
    window_s: float | None
    """What percentiles and counts are of; None is since the server's start."""
    open: int
    running: int
    waiting: int
    queued: Mapping[str, int]
    """Requests that wait at the gateway, by class."""
    requests_per_s: float | None
    """Sequences that ended; None where there is one reading only, as in all rates."""
    tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    ttft: Latency
    tpot: Latency
    hit_rate: float | None
    transfers: int
    transfer_bytes_per_s: float | None
    transfer_p50_s: float | None
    transfer_failures: Mapping[str, int]
    replays: int
    refusals: Mapping[str, int]
    degradations: Mapping[str, int]
    """Requests that were accepted with less than was asked for, by what was lowered."""
    workers: tuple[Worker, ...]


class History:
    """The last readings of one server."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        """The newest; one that counts from the beginning again is of another server, and clears the rest."""
        if self._readings and _restarted(self._readings[-1], reading):
            self._readings.clear()
        self._readings.append(reading)
        while len(self._readings) > 2 and reading.at_s - self._readings[1].at_s >= self._window_s:
            self._readings.popleft()

    def frame(self, *, since_start: bool = False) -> Frame | None:
        """What is to be shown now. `since_start`: percentiles and counts of all that the server ever did."""
        if not self._readings:
            return None
        now, oldest = self._readings[-1], self._readings[0]
        base = None if since_start or oldest is now else oldest
        recent = next((one for one in self._readings if now.at_s - one.at_s <= RATE_S), now)
        if recent is now and len(self._readings) > 1:
            recent = self._readings[-2]
        return _frame(now, base, None if recent is now else recent)


def _restarted(before: Reading, after: Reading) -> bool:
    names = ("engine_starts", "generation_tokens", "prompt_tokens", "request_success")
    return any(after.total(name) < before.total(name) for name in names)


def _frame(now: Reading, base: Reading | None, recent: Reading | None) -> Frame:
    """`base` is what counts and percentiles begin with, `recent` what rates do."""

    def rate(name: str) -> float | None:
        if recent is None or now.at_s <= recent.at_s:
            return None
        return (now.total(name) - recent.total(name)) / (now.at_s - recent.at_s)

    def came(name: str) -> float:
        return now.total(name) - (base.total(name) if base is not None else 0.0)

    def came_by(name: str, label: str) -> dict[str, int]:
        before = base.by(name, label) if base is not None else {}
        found = {key: int(total - before.get(key, 0.0)) for key, total in now.by(name, label).items()}
        return {key: count for key, count in found.items() if count}

    def spread(name: str) -> Distribution:
        found = now.distribution(name)
        return found.since(base.distribution(name)) if base is not None else found

    def latency(name: str, slo: str) -> Latency:
        seen = spread(name)
        return Latency(seen.quantile(0.5), seen.quantile(0.99), int(seen.count), _levels(now, base, slo))

    outcomes = came_by("kv_transfers", "outcome")
    before = {one["id"]: one for one in base.cluster["workers"]} if base is not None else {}
    return Frame(
        model=now.model,
        state=str(now.cluster["state"]),
        window_s=now.at_s - base.at_s if base is not None else None,
        open=int(now.cluster.get("open_sequences", 0)),
        running=int(now.total("num_requests_running")),
        waiting=int(now.total("num_requests_waiting")),
        queued={one["class"]: one["requests"] for one in now.cluster.get("queue", []) if one["requests"]},
        requests_per_s=rate("request_success"),
        tokens_per_s=rate("generation_tokens"),
        prompt_tokens_per_s=rate("prompt_tokens"),
        ttft=latency("time_to_first_token_seconds", "ttft"),
        tpot=latency("request_time_per_output_token_seconds", "tpot"),
        hit_rate=_share(came("prefix_cache_hits"), came("prefix_cache_queries")),
        transfers=outcomes.pop(TRANSFERRED, 0),
        transfer_bytes_per_s=rate("kv_transfer_bytes"),
        transfer_p50_s=spread("kv_transfer_seconds").quantile(0.5),
        transfer_failures=outcomes,
        replays=int(came("request_replays")),
        refusals=came_by("request_refused", "reason"),
        degradations=came_by("request_degraded", "step"),
        workers=tuple(
            sorted(
                (_worker(one, before.get(one["id"])) for one in now.cluster["workers"]),
                key=lambda worker: (
                    ROLES.index(worker.role) if worker.role in ROLES else len(ROLES),
                    worker.name,
                ),
            )
        ),
    )


def _levels(now: Reading, base: Reading | None, slo: str) -> tuple[Level, ...]:
    limits = {
        one["class"]: one["limit_s"]
        for one in (now.cluster.get("slo") or {}).get("attainment", [])
        if one["slo"] == slo
    }

    def judged(band: str, met: str) -> int:
        labels = (("class", band), ("met", met), ("slo", slo))
        before = base.value("slo_requests", labels) if base is not None else 0.0
        return int(now.value("slo_requests", labels) - before)

    return tuple(
        Level(band, limit_s, met := judged(band, "true"), met + judged(band, "false"))
        for band, limit_s in limits.items()
    )


def _worker(one: Mapping[str, Any], before: Mapping[str, Any] | None) -> Worker:
    blocks, cache = one["blocks"], one["prefix_cache"]
    if before is not None and before["generation"] == one["generation"]:
        earlier = before["prefix_cache"]
        cache = {name: cache[name] - earlier[name] for name in cache}
    total = blocks["total"] or 1
    return Worker(
        name=one["id"],
        role=one["role"],
        state=one["state"],
        why=one["why"] or "",
        running=one["running"],
        waiting=one["waiting"],
        open=one["open_sequences"],
        prefills=one["prefills"],
        usage=blocks["held"] / total,
        leased=blocks["leased"] / total,
        hit_rate=_share(cache["hits"], cache["queries"]),
        step_s=one["step_s"],
        steps=one["step"],
        heard_s_ago=one["heard_s_ago"],
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
