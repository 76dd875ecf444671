"""Figures against other ways of computing them, and the forms they are written in."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from headrace.bench.errors import BenchError, Failure, FailureKind
from headrace.bench.plot import check_plot, percentiles_by_window, windows, write_plot
from headrace.bench.record import Counted, Record
from headrace.bench.report import print_summary, write_json, write_requests
from headrace.bench.summary import Context, Distribution, Objectives, Summary, summarise


def record(
    number: int = 0,
    *,
    sent_s: float = 0.0,
    times: list[float] | None = None,
    sizes: list[int] | None = None,
    failure: str | None = None,
    asked: int | None = None,
    due_s: float = 0.0,
) -> Record:
    times = times if times is not None else [1.0, 2.0, 3.0]
    sizes = sizes if sizes is not None else [1] * len(times)
    made = Record(number, number, 0, due_s, due_s, asked)
    made.sent_s, made.times, made.sizes = sent_s, times, sizes
    made.output_tokens, made.input_tokens = sum(sizes), 10
    made.ended_s = times[-1] if times else sent_s
    made.failure = None if failure is None else Failure(failure, "why")
    return made


def summary(records: list[Record], duration_s: float = 10.0, objectives: Objectives | None = None) -> Summary:
    context = Context("t", "w", "l", 0, "2026-01-01T00:00:00+00:00", True, True, objectives)
    return summarise(records, context, duration_s=duration_s, cpu_s=0.5, most_running=3)


@pytest.mark.parametrize("count", [1, 2, 5, 100, 1001])
def test_percentiles_are_exact(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, 1.0, count)
    found = Distribution.of(values)
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99) == tuple(np.percentile(values, (50, 90, 95, 99)))
    assert found.mean == pytest.approx(math.fsum(values) / count, rel=1e-12)
    assert found.max == max(values)
    if count > 1:  # the standard library's own, written by others
        hundredths = statistics.quantiles(values, n=100, method="inclusive")
        expected = [hundredths[49], hundredths[89], hundredths[94], hundredths[98]]
        assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(expected, rel=1e-12)


def test_no_values_have_no_distribution() -> None:
    assert Distribution.of([]) is None


def test_latencies_of_one_token_a_chunk() -> None:
    one = record(sent_s=0.5, times=[1.0, 1.5, 2.5])
    assert (one.ttft_s, one.tpot_s, one.e2e_s) == (0.5, 0.75, 2.0)
    assert one.itl_s().tolist() == [0.5, 1.0]


def test_a_gap_is_shared_by_the_tokens_that_came_together() -> None:
    one = record(times=[1.0, 3.0, 3.5], sizes=[2, 4, 1])
    assert one.itl_s().tolist() == [0.5, 0.5, 0.5, 0.5, 0.5]
    assert one.tpot_s == 0.5
    assert one.tpot_s == pytest.approx(one.itl_s().mean())


def test_a_single_token_has_no_time_per_token() -> None:
    one = record(times=[1.0])
    assert one.tpot_s is None
    assert one.itl_s().size == 0
    assert one.ttft_s == one.e2e_s == 1.0


def test_completed_failed_and_cancelled_are_counted_apart() -> None:
    records = [
        record(0, asked=3),
        record(1, asked=5),
        record(2, failure="http_503", times=[]),
        record(3, failure="http_503", times=[1.0]),
        record(4, failure=FailureKind.TIMEOUT, times=[1.0]),
        record(5, failure=FailureKind.CANCELLED, times=[4.0, 5.0]),
        record(6, failure=FailureKind.CANCELLED, times=[]),
    ]
    found = summary(records)
    assert (found.sent, found.completed, found.failed, found.cancelled, found.short) == (7, 2, 3, 2, 1)
    assert {kind: error.count for kind, error in found.errors.items()} == {
        "cancelled": 2,
        "http_503": 2,
        "timeout": 1,
    }
    assert found.output_tokens == 3 + 3 + 2  # of the completed, and what the stopped run had seen
    assert found.input_tokens == 20
    assert found.requests_per_s == pytest.approx(0.2)
    assert found.output_tokens_per_s == pytest.approx(0.8)
    assert found.ttft_s is not None and (found.ttft_s.count, found.ttft_s.max) == (3, 4.0)
    assert found.e2e_s is not None and found.e2e_s.count == 2
    assert found.itl_s is not None and found.itl_s.count == 5
    assert found.generator.cpu_per_request_s == pytest.approx(0.5 / 7)
    assert found.generator.cpu_per_chunk_s == pytest.approx(0.5 / 10)
    assert found.generator.core_share == pytest.approx(0.05)


def test_the_mean_under_way_is_little_s_law() -> None:
    found = summary([record(i, sent_s=i, times=[i + 2.0]) for i in range(10)], duration_s=12.0)
    assert found.mean_running == pytest.approx(found.requests_per_s * 2.0)


def test_goodput_is_over_all_that_ended_by_themselves() -> None:
    objectives = Objectives.parse("ttft=1500ms, tpot=1s")
    records = [
        record(0),  # good
        record(1, times=[2.0, 2.5]),  # first token too late
        record(2, times=[1.0, 3.0]),  # too slow after it
        record(3, times=[1.0]),  # one token: nothing to be slow about
        record(4, failure="http_503"),
        record(5, failure=FailureKind.CANCELLED),
    ]
    good = summary(records, objectives=objectives).goodput
    assert good is not None
    assert (good.good, good.share, good.requests_per_s) == (2, 2 / 5, 0.2)
    assert good.objectives_s == {"ttft": 1.5, "tpot": 1.0}


def test_an_objective_is_met_at_its_bound() -> None:
    assert Objectives(ttft=1.0).met_by(record())
    assert not Objectives(ttft=0.999).met_by(record())
    assert not Objectives(e2e=2.999).met_by(record())


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=200", "ttft=-1ms", "itl=5ms", "ttft=1ms,ttft=2ms", "ttft=1 h"]
)
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="expected is ttft, tpot or e2e"):
        Objectives.parse(text)


def test_objectives_have_units() -> None:
    assert Objectives.parse("ttft=200ms,tpot=50ms,e2e=2.5s") == Objectives(0.2, 0.05, 2.5)
    assert Objectives.parse("ttft=500us").ttft == pytest.approx(0.0005)


def test_an_empty_run_has_a_summary() -> None:
    found = summary([], duration_s=0.0)
    assert found.ttft_s is None and found.requests_per_s == 0.0
    assert "0 sent" in table(found)


# ---- written down ------------------------------------------------------------------------------------


def table(found: Summary) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_summary(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_says_what_was_found() -> None:
    late = record(0, due_s=-0.25)
    late.ready_s = 0.0
    late.counted = Counted.IDS
    found = table(summary([late, record(1, failure="http_429")], objectives=Objectives(ttft=2.0)))
    text = " ".join(found.split())
    for piece in (
        "2 sent, 1 completed, 1 failed",
        "0.10 requests/s, 1 tokens/s in, 0 tokens/s out",
        "50.0% and 0.10 requests/s with ttft ≤ 2000 ms",
        "5.0% of a core, 250000 µs a request",
        "time to first token 1000 1000",
        "held back at first",
        "by token ids",
        "http_429 1 why",
    ):
        assert piece in text, piece


def test_markup_in_a_servers_words_is_left_alone() -> None:
    bad = record(0, failure="http_500")
    bad.failure = Failure("http_500", "[bold]x[/nothing]")
    assert "[bold]x[/nothing]" in table(summary([bad]))


def test_json_holds_the_whole_summary(tmp_path: Path) -> None:
    found = summary([record(0), record(1, failure="http_503")], objectives=Objectives(ttft=1.0))
    path = tmp_path / "s.json"
    write_json(found, path)
    assert msgspec.json.decode(path.read_bytes(), type=Summary) == found


def test_rows_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    unsent = Record(2, 2, 0, 1.0, 1.0)
    write_requests(
        [record(0), record(1, failure="http_503", times=[]), unsent], 0.5, path, Objectives(ttft=2.0)
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["request"] for row in rows] == [0, 1, 2]
    assert rows[0]["chunks"] == [[0.5, 1], [1.5, 1], [2.5, 1]]
    assert (rows[0]["ttft_s"], rows[0]["sent_s"], rows[0]["good"]) == (1.0, -0.5, True)
    assert (rows[1]["error"], rows[1]["ttft_s"], rows[1]["good"]) == ("http_503", None, False)
    assert rows[2]["sent_s"] is None


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot write"):
        write_json(summary([record()]), tmp_path / "none" / "s.json")


def test_windows_are_coarse_where_points_are_few() -> None:
    assert len(windows(100.0, 10_000)) == 61
    assert len(windows(100.0, 80)) == 11
    assert len(windows(1.0, 10_000)) == 5
    assert windows(0.0, 0).tolist() == [0.0, 1e-9]


def test_percentiles_of_windows_are_those_of_their_values() -> None:
    borders = np.array([0.0, 1.0, 2.0, 3.0])
    found = percentiles_by_window([0.1, 0.9, 2.0, 2.5, 3.0], [1.0, 3.0, 5.0, 6.0, 100.0], borders)
    assert found[0].tolist()[0] == 2.0
    assert np.isnan(found[:, 1]).all()
    assert found[:, 2].tolist() == np.percentile([5.0, 6.0, 100.0], (50, 90, 99)).tolist()


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra headrace[bench]")
    path = tmp_path / "p.png"
    check_plot(path)
    records = [record(i, sent_s=i / 10, times=[i / 10 + 0.1, i / 10 + 0.2]) for i in range(40)]
    write_plot(records, 0.0, 4.2, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    write_plot([], 0.0, 0.0, "nothing", path)
    with pytest.raises(BenchError, match="cannot write"):
        write_plot(records, 0.0, 4.2, "title", tmp_path / "none" / "p.png")


def test_a_plot_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match=r"does not end in \.png"):
        check_plot(tmp_path / "p.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'headrace\[bench\]'"):
        check_plot(tmp_path / "p.png")
