"""What `headrace explain` prints of a request."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.cli.journeys import decision_lines, journey_lines


def candidate(**other: Any) -> dict[str, Any]:
    return {
        "worker": "w",
        "chosen": True,
        "score": 0.5,
        "terms": {"queue": 0.5},
        "cached_tokens": 0,
        "queued_tokens": 0,
        "ttft_s": 0.02,
        "tpot_s": 0.01,
        "age_s": 0.5,
        "heard_s_ago": 0.4,
    } | other


@pytest.mark.parametrize(
    ("age_s", "heard_s_ago", "words"),
    [
        (201.763, 0.412, "heard 412.0 ms before, last step 3 min before"),
        (0.02, 0.02, "heard 20.0 ms before, last step 20.0 ms before"),
        (17.25, 1.5, "heard 1.5 s before, last step 17.2 s before"),
        (9000.0, 0.0, "heard 0.0 ms before, last step 2.5 h before"),
        (None, 0.1, "heard 100.0 ms before, no step yet"),
    ],
)
def test_an_idle_worker_is_as_fresh_as_its_last_heartbeat(
    age_s: float | None, heard_s_ago: float, words: str
) -> None:
    decision = {
        "at_s": 0.0,
        "purpose": "decode",
        "rule": "the only one with room",
        "candidates": [candidate(age_s=age_s, heard_s_ago=heard_s_ago)],
    }
    assert decision_lines(decision)[1].endswith(words)


def event(what: str, worker: str | None = None, **detail: Any) -> dict[str, Any]:
    return {"at_s": 0.0, "what": what, "worker": worker, "detail": detail}


def test_a_refusal_in_words() -> None:
    look = {"class": "normal", "pressure": 1.3124, "ttft_s": 0.2624, "ttft_limit_s": 0.2}
    events = [event("foreseen", **look), event("refused", reason="predicted_ttft", why="it", retry_after_s=3)]
    assert journey_lines({"id": "a-0", "prompt_tokens": 7, "events": events, "decisions": []}) == [
        "request a-0, 7 prompt tokens",
        "        0.0 ms  foreseen  (class normal, pressure 1.312, TTFT 262.4 ms, TTFT limit 200.0 ms)",
        "        0.0 ms  refused  (it, reason predicted_ttft, retry after 3 s)",
    ]
    assert journey_lines({"id": "b", "prompt_tokens": 0, "events": [], "decisions": []}) == ["request b"]


def test_why_a_prompt_stayed_at_home_in_words() -> None:
    numbers = {"uncached_tokens": 900.0, "offloaded_above": 0.75, "why": "its home lacks 0.62 of what p does"}
    (_, line) = journey_lines(
        {"id": "a", "prompt_tokens": 7, "events": [event("not offloaded", "d", **numbers)], "decisions": []}
    )
    assert line == (
        "        0.0 ms  not offloaded [d]  "
        "(its home lacks 0.62 of what p does, uncached tokens 900, offloaded above 0.75)"
    )
