"""A short soak holds, and the checks that say so can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from serving import Samples, samples
from soak import Result, verdict
from soak_workload import Ask, check

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"

PAGE = """
headrace:request_params_n_sum 10
headrace:request_success_total{finished_reason="stop"} 9
headrace:request_success_total{finished_reason="error"} 0
headrace:kv_cache_usage_perc 0
headrace:num_requests_running 0
headrace:num_requests_waiting 0
headrace:engine_starts_total 1
"""
NOTHING = PAGE.replace(" 10", " 0").replace(" 9", " 0")


def test_a_short_soak_holds(smollm2_dir: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(SOAK), "--model", str(smollm2_dir)),
            *("--requests", "60", "--concurrency", "16", "--", "--kv-cache-memory", "32MiB"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"│ held +│$", done.stdout, re.MULTILINE)) == 9, done.stdout


def found(after: str, **changes: object) -> list[str]:
    """The checks that do not hold."""
    result = Result(rss={"engine": [(share / 10, 10**8) for share in range(11)]}, sent=1)
    result.count(Ask("/", b""), None)
    for name, change in changes.items():
        setattr(result, name, change)
    return [each.name for each in verdict(result, page(NOTHING), page(after)) if not each.held]


def page(text: str) -> Samples:
    return samples(text)


@pytest.mark.parametrize(
    ("line", "instead", "broken"),
    [
        ('"stop"} 9', '"stop"} 10', []),
        ('"stop"} 9', '"stop"} 9', ["one ending for each sequence"]),
        ('"stop"} 9', '"stop"} 11', ["one ending for each sequence"]),
        ('"error"} 0', '"error"} 1', ["no sequence ended in an error"]),
        ("usage_perc 0", "usage_perc 0.01", ["one ending for each sequence", "all KV blocks back"]),
        ("starts_total 1", "starts_total 2", ["one ending for each sequence", "the engine never ended"]),
    ],
)
def test_what_the_page_must_say(line: str, instead: str, broken: list[str]) -> None:
    assert found(PAGE.replace(line, instead)) == broken


def test_memory_that_grows_and_answers_that_lack() -> None:
    whole = PAGE.replace('"stop"} 9', '"stop"} 10')
    growing = {"engine": [(share / 10, 10**8 + share * 10**7) for share in range(11)]}
    assert found(whole, rss=growing) == ["memory flat: engine"]
    assert found(whole, sent=2) == ["every answer as it must be, none 5xx"]


@pytest.mark.parametrize(
    ("ask", "body", "wrong"),
    [
        (Ask("/", b"", 400), b'{"error": {"message": "n must be at least 1"}}', None),
        (Ask("/", b"", 400), b'{"error": {"message": ""}}', "an error without a message"),
        (Ask("/", b"", 400), b"Internal Server Error", "JSONDecodeError"),
        (Ask("/", b""), b'{"choices": [{"index": 0, "finish_reason": "stop"}]}', None),
        (Ask("/", b""), b'{"choices": [{"index": 0, "finish_reason": null}]}', "endings of choices []"),
        (
            Ask("/", b"", stream=True),
            b'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n',
            None,
        ),
        (
            Ask("/", b"", stream=True),
            2 * b'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\n' + b"data: [DONE]\n\n",
            "endings of choices [0, 0]",
        ),
        (
            Ask("/", b"", stream=True),
            b'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\n',
            "the stream ends with",
        ),
    ],
)
def test_what_is_wrong_with_an_answer(ask: Ask, body: bytes, wrong: str | None) -> None:
    said = check(ask, body)
    assert said is None if wrong is None else wrong in (said or "")
