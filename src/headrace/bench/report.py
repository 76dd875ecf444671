"""A summary as a table for people, JSON for programs, and rows of requests for whoever digs deeper."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import orjson
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.bench.errors import BenchError
from headrace.bench.record import Counted, Record
from headrace.bench.summary import Distribution, Objectives, Summary

_COUNTED = {
    Counted.IDS: "by token ids",
    Counted.USAGE: "by the server's running count",
    Counted.TEXT: "by the server's total, shared out by length of text",
    Counted.CHUNKS: "one per chunk: the server sends no usage",
}


def print_summary(summary: Summary, console: Console) -> None:
    """The table."""
    begun = "stopped; this is what was measured so far" if summary.interrupted else "complete"
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(summary):
        facts.add_row(name, escape(value))
    console.print(f"[bold]headrace bench[/bold], {begun}")
    console.print(facts)
    console.print(_latencies(summary))
    if summary.errors:
        errors = Table("failed", "requests", "for example", box=None, padding=(0, 2, 0, 0))
        for kind, error in summary.errors.items():
            errors.add_row(kind, str(error.count), escape(error.example))
        console.print(errors)
    for note in summary.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _facts(summary: Summary) -> Iterable[tuple[str, str]]:
    yield "target", summary.target
    yield "workload", f"{summary.workload}; seed {summary.seed}"
    yield "load", summary.load
    counts = f"{summary.sent} sent, {summary.completed} completed, {summary.failed} failed"
    for number, what in (
        (summary.cancelled, "cancelled"),
        (summary.unsent, "not sent after a failure or the end"),
        (summary.short, "shorter than asked"),
    ):
        counts += f", {number} {what}" if number else ""
    yield "requests", counts
    yield (
        "under way",
        f"{summary.mean_running:.1f} in the mean, {summary.most_running} at most, "
        f"over {summary.duration_s:.1f} s",
    )
    yield (
        "throughput",
        f"{summary.requests_per_s:.2f} requests/s, {summary.input_tokens_per_s:.0f} tokens/s in, "
        f"{summary.output_tokens_per_s:.0f} tokens/s out",
    )
    cached = ""
    if summary.cached_tokens is not None and summary.input_tokens:
        cached = f" ({100 * summary.cached_tokens / summary.input_tokens:.0f}% from the server's cache)"
    yield "tokens", f"{summary.input_tokens} in{cached}, {summary.output_tokens} out"
    if summary.goodput is not None:
        bounds = ", ".join(f"{name} ≤ {_ms(s)} ms" for name, s in summary.goodput.objectives_s.items())
        good = summary.goodput
        yield "goodput", f"{100 * good.share:.1f}% and {good.requests_per_s:.2f} requests/s with {bounds}"
    cost = summary.generator
    lag = (
        ""
        if cost.lag_s is None
        else f"; sends late by {_ms(cost.lag_s.mean)} ms, p99 {_ms(cost.lag_s.p99)} ms"
    )
    yield (
        "generator",
        f"{100 * cost.core_share:.1f}% of a core, {cost.cpu_per_request_s * 1e6:.0f} µs a request or "
        f"{cost.cpu_per_chunk_s * 1e6:.1f} µs a chunk{lag}",
    )
    if summary.tokens_per_chunk is not None:
        ways = ", ".join(_COUNTED[kind] for kind in summary.chunks_counted_by)
        sizes = summary.tokens_per_chunk
        yield "tokens a chunk", f"{sizes.mean:.2f} in the mean, {sizes.max:.0f} at most ({ways})"


def _latencies(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("milliseconds", no_wrap=True)
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, Distribution | None]] = [
        ("time to first token", summary.ttft_s),
        ("time per output token", summary.tpot_s),
        ("inter-token latency", summary.itl_s),
        ("end to end", summary.e2e_s),
    ]
    if summary.held_back_s is not None and summary.held_back_s.max > 1e-3:
        rows.append(("held back at first", summary.held_back_s))
    for name, values in rows:
        if values is None:
            table.add_row(name, *["-"] * 6)
        else:
            table.add_row(
                name,
                *(_ms(s) for s in (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)),
            )
    return table


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f}"


def write_json(summary: Summary, path: Path) -> None:
    """Raises BenchError when `path` cannot be written."""
    write_file(path, msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")


def write_requests(
    records: Iterable[Record], began_s: float, path: Path, objectives: Objectives | None
) -> None:
    """One JSON line for each request; times in seconds from the beginning of the run. Raises BenchError."""
    write_file(path, b"".join(_row(record, began_s, objectives) for record in records))


def _row(record: Record, began_s: float, objectives: Objectives | None) -> bytes:
    def since(at: float | None) -> float | None:
        return None if at is None else at - began_s

    return orjson.dumps(
        {
            "request": record.number,
            "session": record.session,
            "turn": record.turn,
            "due_s": since(record.due_s),
            "ready_s": since(record.ready_s),
            "sent_s": since(record.sent_s),
            "first_byte_s": since(record.first_byte_s),
            "ended_s": since(record.ended_s),
            "ttft_s": record.ttft_s,
            "tpot_s": record.tpot_s,
            "e2e_s": record.e2e_s,
            "input_tokens": record.input_tokens,
            "cached_tokens": record.cached_tokens,
            "asked_tokens": record.asked_tokens,
            "output_tokens": record.output_tokens,
            "finish_reason": record.finish_reason,
            "error": None if record.failure is None else record.failure.kind,
            "message": None if record.failure is None else record.failure.message,
            "good": None if objectives is None else objectives.met_by(record),
            "chunks": [[at - began_s, size] for at, size in zip(record.times, record.sizes, strict=False)],
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def write_file(path: Path, content: bytes) -> None:
    """Raises BenchError when `path` cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
