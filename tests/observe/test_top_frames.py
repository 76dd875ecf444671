"""From two answers of a server to what `headrace top` shows: numbers, and how they look at any width."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from top_recorded import APART_S, cluster, metrics, reading

from headrace.observe.top.frame import Frame, History
from headrace.observe.top.layout import covers, headline, layout
from headrace.observe.top.reading import Distribution, Reading

SEEN = Distribution((1.0, 2.0, 4.0, math.inf), (10.0, 10.0, 30.0, 40.0))


def history(*readings: Reading, **options: Any) -> History:
    found = History(**options)
    for one in readings:
        found.add(one)
    return found


def frame(*readings: Reading, since_start: bool = False) -> Frame:
    found = history(*(readings or (reading(1), reading(2)))).frame(since_start=since_start)
    assert found is not None
    return found


def text(shown: Frame, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(headline(shown, "http://127.0.0.1:8000"))
    console.print(layout(shown, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- distributions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "size"), [(0.1, 0.4), (0.25, 1.0), (0.5, 3.0), (0.75, 4.0), (0.76, math.inf), (1.0, math.inf)]
)
def test_quantiles_are_interpolated(share: float, size: float) -> None:
    assert SEEN.quantile(share) == pytest.approx(size)


def test_nothing_seen_has_none() -> None:
    for nothing in (Distribution(), SEEN.since(SEEN)):
        assert nothing.quantile(0.5) is None
        assert nothing.count == 0


# ---- readings and frames ---------------------------------------------------------------------------------


def test_a_reading_has_the_servers_metrics() -> None:
    found = reading(1)
    assert found.model == "smollm2-135m"
    assert found.total("engine_up") == 3
    assert found.by("request_success", "finished_reason")["length"] == 48
    assert found.distribution("time_to_first_token_seconds").count > 0
    assert found.total("no_such_metric") == 0
    assert found.distribution("no_such_metric").count == 0


def test_what_is_no_prometheus_text_is_refused() -> None:
    with pytest.raises(ValueError):
        Reading.of(0.0, cluster(1), "<html> {")


def test_a_frame_is_of_the_time_between_two_readings() -> None:
    first, second, shown = reading(1), reading(2), frame()
    assert shown.window_s == APART_S
    assert (
        shown.requests_per_s == (second.total("request_success") - first.total("request_success")) / APART_S
    )
    assert shown.tokens_per_s == pytest.approx(
        (second.total("generation_tokens") - first.total("generation_tokens")) / APART_S
    )
    assert shown.ttft.count == 9
    assert shown.ttft.slo_s == 1.0
    assert shown.ttft.p50_s is not None and shown.ttft.p99_s is not None
    assert shown.ttft.p50_s < shown.ttft.p99_s
    assert [(level.band, level.limit_s, level.met, level.judged) for level in shown.ttft.levels] == [
        ("high", 1.0, 0, 0),
        ("normal", 1.0, 6, 8),
        ("low", 3.0, 0, 0),
    ]
    assert [level.within for level in shown.ttft.levels] == [None, 0.75, None]
    assert [level.limit_s for level in shown.tpot.levels] == [0.15, 0.15, 0.15]
    assert shown.transfers == 9
    assert (shown.running, shown.waiting, shown.open) == (5, 3, 8)


def test_since_the_start_counts_everything_and_still_has_rates() -> None:
    shown = frame(since_start=True)
    assert shown.window_s is None
    assert shown.ttft.count == reading(2).distribution("time_to_first_token_seconds").count
    assert shown.requests_per_s == frame().requests_per_s


def test_one_reading_has_no_rates() -> None:
    shown = frame(reading(1))
    assert shown.window_s is None
    assert shown.requests_per_s is None
    assert shown.ttft.count > 9
    assert History().frame() is None


def test_a_workers_hit_rate_is_of_the_window_unless_its_engine_is_another() -> None:
    (before, after), other = (reading(1), reading(2)), cluster(2)
    name = "decode-1"
    counts = [
        next(one["prefix_cache"] for one in r.cluster["workers"] if one["id"] == name)
        for r in (before, after)
    ]
    came = {key: counts[1][key] - counts[0][key] for key in ("hits", "queries")}
    worker = {w.name: w for w in frame(before, after).workers}[name]
    assert worker.hit_rate == came["hits"] / came["queries"]
    for one in other["workers"]:
        one["generation"] = "another"
    restarted = frame(before, replace(after, cluster=other))
    assert {w.name: w for w in restarted.workers}[name].hit_rate == counts[1]["hits"] / counts[1]["queries"]


def test_workers_are_in_the_order_of_their_pools() -> None:
    assert [worker.name for worker in frame().workers] == ["prefill-1", "decode-1", "decode-2"]


def test_a_server_that_began_again_clears_what_was_before() -> None:
    shown = frame(reading(2), replace(reading(1), at_s=8.0))
    assert shown.window_s is None


def test_old_readings_are_dropped() -> None:
    later = [replace(reading(2), at_s=at_s) for at_s in (10.0, 20.0, 30.0, 40.0)]
    shown = history(reading(1), *later, window_s=20.0).frame()
    assert shown is not None
    assert shown.window_s == 20.0


def test_reasons_are_told_apart() -> None:
    busy = metrics(2)
    for name, labels, count in (
        ("request_refused_total", 'reason="overloaded"', 7),
        ("kv_transfers_total", 'outcome="stalled"', 2),
        ("kv_transfers_total", 'outcome="lost"', 3),
    ):
        mark = f'headrace:{name}{{model_name="smollm2-135m",{labels}}} 0.0'
        assert mark in busy or mark.replace(f'model_name="smollm2-135m",{labels}', "") not in busy
        line = next(
            line for line in busy.splitlines() if line.startswith(f"headrace:{name}{{") and labels in line
        )
        busy = busy.replace(line, f"{line.rpartition(' ')[0]} {count}.0")
    busy += "# TYPE headrace:request_degraded_total counter\n"
    for band, count in (("normal", 3), ("low", 1)):
        labels = f'model_name="smollm2-135m",class="{band}",step="n=1"'
        busy += f"headrace:request_degraded_total{{{labels}}} {count}.0\n"
    shown = frame(reading(1), Reading.of(APART_S, cluster(2), busy))
    assert shown.degradations == {"n=1": 4}
    assert "4 degraded" in text(shown, 80)
    assert "4 degraded: n=1 4" in text(shown, 200)
    assert shown.refusals == {"overloaded": 7}
    assert shown.transfer_failures == {"stalled": 2, "lost": 3}
    assert "5 failed: lost 3, stalled 2" in text(shown, 80)
    assert "7 refused: overloaded 7" in text(shown, 200)


# ---- looks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 120, 139, 140, 200, 300])
def test_nothing_is_wider_than_the_screen_or_cut(width: int) -> None:
    said = text(frame(), width)
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    for word in (
        *("smollm2-135m", "ready, 3 of 3 workers up", "8 open", "5 running", "3 waiting", "0 refused"),
        *(
            "TTFT",
            "TPOT",
            "normal 1.00 s",
            "low 3.00 s",
            "high 150 ms",
            "hit rate 40%",
            "0 failed",
            "0 replayed",
            "MiB/s",
        ),
        *(
            "75% of 8 within",
            "prefill-1",
            "decode-2",
            "2 of 2 up",
            "KV USAGE",
            "HIT",
            "STEP",
            "last 4 s",
            "█",
            "░",
        ),
    ):
        assert word in said, word
    assert ("LEASED" in said) == (width >= 120)


def test_names_and_reasons_are_no_markup_and_long_ones_are_cut() -> None:
    other = cluster(2)
    other["workers"][0] |= {"id": "[/bold]" + "x" * 60, "state": "down", "why": "lost " * 30}
    shown = frame(replace(reading(2), cluster=other))
    for width in (80, 200):
        said = text(shown, width)
        assert "[/bold]" in said
        assert "down: lost" in said
        assert max(map(len, said.splitlines())) <= width


def test_a_reason_takes_no_room_from_numbers() -> None:
    other = cluster(2)
    other["workers"][0] |= {"state": "down", "why": "its connection ended, and it is gone"}
    said = text(frame(replace(reading(2), cluster=other)), 80)
    assert "…" not in said
    assert "down: its" in said and "gone" in said


def test_a_server_that_says_little_is_shown_all_the_same() -> None:
    bare = Reading.of(0.0, {"state": "starting", "workers": []}, "")
    for width in (80, 200):
        said = text(frame(bare), width)
        assert "starting, 0 of 0 workers up" in said
        assert "no worker has joined yet" in said
    assert covers(frame(bare)) == "since the start"


def test_models_are_taken_together() -> None:
    one = metrics(2)
    name = Reading.of(0.0, cluster(2), one).model
    ours, theirs = f'model_name="{name}"', 'model_name="another"'
    lines = ([line, line.replace(ours, theirs)] if ours in line else [line] for line in one.splitlines())
    both = Reading.of(0.0, cluster(2), "\n".join(line for each in lines for line in each) + "\n")
    alone = Reading.of(0.0, cluster(2), one)
    assert both.model == f"{name}, another"
    assert both.total("generation_tokens") == 2 * alone.total("generation_tokens") > 0
    ttft = "time_to_first_token_seconds"
    assert both.distribution(ttft).bounds == alone.distribution(ttft).bounds
    assert both.distribution(ttft).count == 2 * alone.distribution(ttft).count > 0
