"""Two readings of a real server under load, 4 s apart: one prefill worker and two that decode, an SLO. What
each class may expect and got is added, for the server had one class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.observe.top.reading import Reading

RECORDED = Path(__file__).parent / "recorded"
APART_S = 4.0


LIMITS_S = {
    "ttft": {"high": 1.0, "normal": 1.0, "low": 3.0},
    "tpot": dict.fromkeys(("high", "normal", "low"), 0.15),
}
JUDGED = {1: {"true": 10, "false": 0}, 2: {"true": 16, "false": 2}}
"""At the two readings, of class normal's first tokens."""


def cluster(number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"cluster_{number}.json").read_text())
    found["slo"]["attainment"] = [
        {"class": band, "slo": slo, "window": window, "limit_s": limit_s}
        for window in ("5m", "1h")
        for slo, limits_s in LIMITS_S.items()
        for band, limit_s in limits_s.items()
    ]
    return found


def metrics(number: int) -> str:
    judged = "# TYPE headrace:slo_requests_total counter\n"
    for met, count in JUDGED[number].items():
        labels = f'model_name="smollm2-135m",class="normal",slo="ttft",met="{met}"'
        judged += f"headrace:slo_requests_total{{{labels}}} {count}.0\n"
    return (RECORDED / f"metrics_{number}.txt").read_text() + judged


def reading(number: int, **other: Any) -> Reading:
    """The first or the second one, with other fields in the answer of /cluster."""
    return Reading.of(APART_S * (number - 1), cluster(number) | other, metrics(number))
