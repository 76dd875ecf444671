"""Who waits at the gateway, as `headrace status` and `headrace top` show it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_top_frames import frame, text
from top_recorded import cluster, reading

from headrace.cli.cluster import queue_lines
from headrace.observe.instruments import HistogramBy

QUEUE = [
    {"class": "high", "requests": 0, "prompt_tokens": 0, "longest_s": 0.0},
    {"class": "normal", "requests": 3, "prompt_tokens": 4096, "longest_s": 1.25},
    {"class": "low", "requests": 12, "prompt_tokens": 90_000, "longest_s": 42.0},
]


def test_status_has_a_line_for_each_class_that_waits() -> None:
    assert queue_lines(QUEUE) == [
        "  3 of normal priority wait at the gateway, with 4096 prompt tokens, the first for 1.2 s",
        "  12 of low priority wait at the gateway, with 90000 prompt tokens, the first for 42.0 s",
    ]
    assert queue_lines([]) == []


@pytest.mark.parametrize("width", [80, 200])
def test_top_shows_them_where_there_are_any(width: int) -> None:
    waiting = frame(replace(reading(2), cluster={**cluster(2), "queue": QUEUE}))
    assert waiting.queued == {"normal": 3, "low": 12}
    shown = text(waiting, width)
    assert "15 queued" in shown
    assert "normal 3" in shown and "low 12" in shown
    assert max(map(len, shown.splitlines())) <= width
    assert "15 queued" not in text(frame(), width)


def test_a_histogram_by_label_counts_each_for_itself() -> None:
    waits = HistogramBy("w", "Waits.", (1.0, 10.0), "class", ("high", "low"))
    waits.each["low"].observe(5.0)
    waits.each["low"].observe(50.0)
    samples = waits.family({"model": "m"}).samples
    found = {(one.name, one.labels["class"], one.labels.get("le")): one.value for one in samples}
    assert found["w_bucket", "low", "1.0"] == 0
    assert found["w_bucket", "low", "10.0"] == 1
    assert found["w_bucket", "low", "+Inf"] == found["w_count", "low", None] == 2
    assert found["w_sum", "low", None] == 55.0
    assert found["w_count", "high", None] == 0
    assert {one.labels["model"] for one in samples} == {"m"}
