"""How a frame looks, at any width from 80 columns on.

In: a `Frame`. Out: something that rich prints and Textual shows. Colour only stresses what words and numbers
say already, so that a frame without colour says the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.observe.top.frame import ROLES, Frame, Latency, Level, Worker

WIDE = 120
"""From so many columns on, workers have more of them."""
PANELS = 140
"""From so many on, what is summed up stands side by side."""
_NONE = "-"
_GOOD, _FAIR, _BAD, _DIM = "green", "yellow", "red", "dim"
_FULL = 0.9
"""A KV cache from here on is nearly full."""
_STATES = {"up": _GOOD, "suspect": _FAIR, "draining": _FAIR, "down": _BAD}


def layout(frame: Frame, width: int) -> RenderableType:
    """The frame for so many columns."""
    if width < PANELS:
        return Group(_lines(frame), Text(), _workers(frame, width))
    panels = Table.grid(expand=True, padding=(0, 2))
    for _ in range(3):
        panels.add_column(ratio=1)
    panels.add_row(_requests(frame), _latencies(frame), _transfers(frame))
    return Group(panels, Text(), _workers(frame, width))


def headline(frame: Frame, where: str) -> Text:
    """What is looked at, and how it is."""
    up = sum(worker.state == "up" for worker in frame.workers)
    state_style = _GOOD if frame.state == "ready" else _BAD if frame.state == "dead" else _FAIR
    return Text.assemble(
        (frame.model or "no model", "bold"),
        (f" at {where}  ", _DIM),
        (frame.state, state_style),
        f", {up} of {len(frame.workers)} workers up",
    )


def covers(frame: Frame) -> str:
    """What percentiles and counts are of."""
    return "since the start" if frame.window_s is None else f"last {_duration(frame.window_s)}"


# ---- what is summed up -------------------------------------------------------------------------------------


def _lines(frame: Frame) -> Group:
    """A line for each thing, where there is little room."""
    rows = Table.grid(padding=(0, 1))
    for width in (12, 13, 11, 13, None):
        rows.add_column(width=width, no_wrap=width is not None)
    open_, running, waiting = _queues(frame)
    rows.add_row(_name("Requests"), f"{_rate(frame.requests_per_s)}/s ended", open_, running, waiting)
    if frame.queued:
        by_class = [f"{name} {count}" for name, count in frame.queued.items()]
        rows.add_row(_name("Gateway"), Text(f"{sum(frame.queued.values())} queued", _FAIR), *by_class)
    tokens = f"{_rate(frame.tokens_per_s)}/s out", f"{_rate(frame.prompt_tokens_per_s)}/s in"
    rows.add_row(_name("Tokens"), *tokens, "", f"hit rate {_percent(frame.hit_rate)}")
    for name, latency in _timed(frame):
        first, *others = [_against_slo(level) for level in latency.levels] or [("", Text())]
        rows.add_row(_name(name), *_percentiles(latency), *first)
        for level in others:
            rows.add_row("", "", "", *level)
    moved = f"{frame.transfers} moved", f"{_bytes(frame.transfer_bytes_per_s)}/s"
    failed = _tally(frame.transfer_failures, _BAD, "failed")
    rows.add_row(_name("Transfers"), *moved, f"p50 {_seconds(frame.transfer_p50_s)}", failed)
    degraded = sum(frame.degradations.values())
    few = Text(f"{degraded} degraded", _FAIR if degraded else "")
    rows.add_row(_name("Trouble"), _replays(frame), few, "", _tally(frame.refusals, _BAD, "refused"))
    return Group(rows, Text(f"{' ' * 13}{covers(frame)}", _DIM))


def _requests(frame: Frame) -> Group:
    rows = _rows()
    open_, running, waiting = _queues(frame)
    rows.add_row(_label("ended"), f"{_rate(frame.requests_per_s)}/s", open_)
    rows.add_row(_label("queues"), running, waiting)
    rows.add_row(_label("gateway"), _tally(frame.queued, _FAIR, "queued"), "")
    tokens = f"{_rate(frame.tokens_per_s)}/s out", f"{_rate(frame.prompt_tokens_per_s)}/s in"
    rows.add_row(_label("tokens"), *tokens)
    rows.add_row(_label("prefix"), f"hit rate {_percent(frame.hit_rate)}", "")
    rows.add_row(_label("trouble"), _replays(frame), _tally(frame.refusals, _BAD, "refused"))
    rows.add_row("", "", _tally(frame.degradations, _FAIR, "degraded"))
    return Group(_name("Requests"), rows)


def _latencies(frame: Frame) -> Group:
    rows = _rows()
    for name, latency in _timed(frame):
        rows.add_row(_label(name), *_percentiles(latency))
        for level in latency.levels:
            rows.add_row("", *_against_slo(level))
    return Group(_name(f"Latency, {covers(frame)}"), rows)


def _transfers(frame: Frame) -> Group:
    rows = _rows()
    rows.add_row(_label("moved"), f"{frame.transfers}", f"p50 {_seconds(frame.transfer_p50_s)}")
    rows.add_row(_label("rate"), f"{_bytes(frame.transfer_bytes_per_s)}/s", "")
    rows.add_row("", _tally(frame.transfer_failures, _BAD, "failed"), "")
    return Group(_name(f"Transfers, {covers(frame)}"), rows)


def _rows() -> Table:
    rows = Table.grid(padding=(0, 1))
    rows.add_column(width=10, no_wrap=True)
    rows.add_column(min_width=14)
    rows.add_column()
    return rows


def _name(text: str) -> Text:
    return Text(text, "bold")


def _label(text: str) -> Text:
    return Text(f"  {text}", _DIM)


def _queues(frame: Frame) -> tuple[str, str, Text]:
    waiting = Text(f"{frame.waiting} waiting", _FAIR if frame.waiting > frame.running else "")
    return f"{frame.open} open", f"{frame.running} running", waiting


def _replays(frame: Frame) -> Text:
    return Text(f"{frame.replays} replayed", _FAIR if frame.replays else "")


def _tally(found: Mapping[str, int], style: str, what: str) -> Text:
    """How many there were of something bad, and for what reasons, the commonest first."""
    if not found:
        return Text(f"0 {what}")
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda one: -one[1]))
    return Text(f"{sum(found.values())} {what}: {reasons}", style)


def _timed(frame: Frame) -> tuple[tuple[str, Latency], ...]:
    return ("TTFT", frame.ttft), ("TPOT", frame.tpot)


def _percentiles(latency: Latency) -> tuple[Text, Text]:
    return (
        Text.assemble("p50 ", _time_against(latency.p50_s, latency.slo_s)),
        Text.assemble("p99 ", _time_against(latency.p99_s, latency.slo_s)),
    )


def _against_slo(level: Level) -> tuple[str, Text]:
    """What a class may expect, and how many of it got that."""
    within = Text(_NONE)
    if level.within is not None:
        style = _GOOD if level.within >= 0.99 else _FAIR if level.within >= 0.5 else _BAD
        within = Text(f"{level.within:.0%} of {level.judged} within", style)
    return f"{level.band} {_seconds(level.limit_s)}", within


def _time_against(time_s: float | None, slo_s: float | None) -> Text:
    if time_s is None or slo_s is None:
        return Text(_seconds(time_s))
    return Text(_seconds(time_s), _GOOD if time_s <= slo_s else _BAD)


# ---- pools and workers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    pool: Callable[[list[Worker]], str | Text]
    worker: Callable[[Worker], str | Text]
    wide: bool = False
    """Whether it is left out where there is little room."""
    right: bool = True


def _workers(frame: Frame, width: int) -> Table:
    columns = [column for column in _columns(width) if width >= WIDE or not column.wide]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=column.heading != "STATE",  # where room is short, it goes over two lines
            overflow="ellipsis",
            max_width=24 if column.heading == "WORKER" and width < WIDE else None,
        )
    roles = [*ROLES, *sorted({worker.role for worker in frame.workers} - set(ROLES))]
    for role in roles:
        pool = [worker for worker in frame.workers if worker.role == role]
        if not pool:
            continue
        if len(pool) > 1 or len(frame.workers) > 1:
            table.add_row(*(_text(column.pool(pool)) for column in columns), style="bold")
        for worker in pool:
            table.add_row(*(_text(column.worker(worker)) for column in columns))
    if not frame.workers:
        table.add_row(Text("no worker has joined yet", _FAIR))
    return table


def _columns(width: int) -> Iterable[_Column]:
    bar = 10 if width < WIDE else max(16, min(48, width - 110))

    def total(count: Callable[[Worker], int]) -> Callable[[list[Worker]], str]:
        return lambda pool: f"{sum(map(count, pool))}"

    yield _Column("WORKER", lambda pool: pool[0].role, lambda w: f"  {w.name}", right=False)
    yield _Column("STATE", _pool_state, _state, right=False)
    yield _Column("RUN", total(lambda w: w.running), lambda w: f"{w.running}")
    yield _Column("WAIT", total(lambda w: w.waiting), lambda w: f"{w.waiting}")
    yield _Column("OPEN", total(lambda w: w.open), lambda w: f"{w.open}", wide=True)
    yield _Column("PREFILLS", total(lambda w: w.prefills), lambda w: f"{w.prefills}", wide=True)
    yield _Column(
        "KV USAGE",
        lambda pool: _bar(_mean(w.usage for w in pool), bar),
        lambda w: _bar(w.usage, bar),
        right=False,
    )
    yield _Column(
        "LEASED",
        lambda pool: _percent(_mean(w.leased for w in pool)),
        lambda w: _percent(w.leased),
        wide=True,
    )
    yield _Column(
        "HIT",
        lambda pool: _percent(_mean(w.hit_rate for w in pool if w.hit_rate is not None)),
        lambda w: _percent(w.hit_rate),
    )
    yield _Column(
        "STEP",
        lambda pool: _seconds(_mean(w.step_s for w in pool if w.step_s is not None)),
        lambda w: _seconds(w.step_s),
    )
    yield _Column("STEPS", lambda pool: "", lambda w: f"{w.steps}", wide=True)
    yield _Column("HEARD", lambda pool: "", lambda w: f"{w.heard_s_ago:.1f} s", wide=True)


def _text(cell: str | Text) -> Text:
    """As it stands: what others call their workers is no markup."""
    return cell if isinstance(cell, Text) else Text(cell)


def _pool_state(pool: list[Worker]) -> str:
    return f"{sum(worker.state == 'up' for worker in pool)} of {len(pool)} up"


def _state(worker: Worker) -> Text:
    why = f": {worker.why}" if worker.why else ""
    return Text(worker.state + why, _STATES.get(worker.state, ""))


def _bar(share: float | None, width: int) -> Text:
    if share is None:
        return Text(_NONE)
    full = min(width, round(share * width)) or (1 if share > 0 else 0)
    style = _BAD if share >= _FULL else _GOOD
    return Text.assemble(("█" * full, style), ("░" * (width - full), _DIM), f" {share:4.0%}")


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


# ---- numbers -----------------------------------------------------------------------------------------------


def _rate(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.0%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    if math.isinf(value):
        return "beyond"
    if value >= 10:
        return f"{value:.0f} s"
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{value * 1e3:.3g} ms"
        if value < 0.1
        else f"{value * 1e3:.0f} ms"
    )


def _duration(value: float) -> str:
    return f"{value:.0f} s" if value >= 1 else f"{value:.1f} s"


def _bytes(value: float | None) -> str:
    if value is None:
        return _NONE
    size, unit = (value / 2**20, "MiB") if value >= 2**20 / 10 else (value / 2**10, "KiB")
    return f"{size:.1f} {unit}"
