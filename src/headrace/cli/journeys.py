"""What happened to a request, in words: the same of a server's as of a simulated cluster's.

In: a journey as `Journey.as_json` makes it. Out: lines.
"""

from __future__ import annotations

from typing import Any

MOST_CANDIDATES = 8
"""Of a decision, so many are shown to people; `--json` has all."""


def journey_lines(journey: dict[str, Any]) -> list[str]:
    """One request's way in words, an event a line."""
    read = f", {journey['prompt_tokens']} prompt tokens" if journey["prompt_tokens"] else ""
    lines = [f"request {journey['id']}{read}"]
    for event in journey["events"]:
        where = f" [{event['worker']}]" if event["worker"] else ""
        detail = ", ".join(_detail(name, value) for name, value in _why_first(event["detail"]))
        lines.append(f"{_at(event)}  {event['what']}{where}{f'  ({detail})' if detail else ''}")
    for decision in journey["decisions"]:
        lines += decision_lines(decision)
    return lines


def decision_lines(decision: dict[str, Any]) -> list[str]:
    """Why one worker was chosen, in words, a candidate a line."""
    candidates = decision["candidates"]
    lines = [
        f"{_at(decision)}  to {decision['purpose']}: {candidates[0]['worker']}, of "
        f"{len(candidates)}: {decision['rule']}"
    ]
    for one in candidates[:MOST_CANDIDATES]:
        terms = " + ".join(f"{name} {_score(value)}" for name, value in one["terms"].items())
        lines.append(
            f"      {'→' if one['chosen'] else ' '} {one['worker']}: {_score(one['score'])} = {terms}; "
            f"{one['cached_tokens']} tokens cached, {one['queued_tokens']} queued, "
            f"TTFT {_span(one['ttft_s'])}, TPOT {_span(one['tpot_s'])} predicted; {_told(one)}"
        )
    if len(candidates) > MOST_CANDIDATES:
        lines.append(f"        and {len(candidates) - MOST_CANDIDATES} more; see --json")
    return lines


def _told(one: dict[str, Any]) -> str:
    """How old what is known of a candidate is. One that has nothing to do makes no steps, and is heard."""
    stepped = f"last step {_span(one['age_s'])} before" if one["age_s"] is not None else "no step yet"
    return f"heard {_span(one['heard_s_ago'])} before, {stepped}"


def _at(what: dict[str, Any]) -> str:
    return f"  {what['at_s'] * 1e3:9.1f} ms"


def _score(value: float | None) -> str:
    return "out of the question" if value is None else f"{value:.3f}"


def _why_first(detail: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(detail.items(), key=lambda item: item[0] != "why")


def _detail(name: str, value: str | int | float) -> str:
    if name == "why":
        return str(value)
    if name == "bytes" and isinstance(value, int):
        return f"{value / 2**20:.1f} MiB"
    said = _span(value) if name.endswith("_s") and isinstance(value, int | float) else _number(value)
    words = name.removesuffix("_s").replace("_", " ").replace("ttft", "TTFT").replace("tpot", "TPOT")
    return f"{words} {said}"


def _number(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"


def _span(seconds: float) -> str:
    """In a unit that fits."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
