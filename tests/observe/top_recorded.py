"""Two readings of a real server under load, 4 s apart: one prefill worker and two that decode, an SLO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.observe.top.reading import Reading

RECORDED = Path(__file__).parent / "recorded"
APART_S = 4.0


def cluster(number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / f"cluster_{number}.json").read_text())
    return found


def metrics(number: int) -> str:
    return (RECORDED / f"metrics_{number}.txt").read_text()


def reading(number: int, **other: Any) -> Reading:
    """The first or the second one, with other fields in the answer of /cluster."""
    return Reading.of(APART_S * (number - 1), cluster(number) | other, metrics(number))
