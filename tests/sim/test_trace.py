"""Arrivals: of files in the formats of published traces, of made-up sessions, and at other rates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from headrace.sim.trace import Answer, Piece, Sessions, at_rate, read_arrivals

MOONCAKE = """\
{"timestamp": 1000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 46, 47]}
{"timestamp": 3000, "input_length": 700, "output_length": 1, "hash_ids": [0, 99]}
{"timestamp": 2000, "input_length": 9000, "output_length": 5, "hash_ids": \
[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]}
"""
AZURE = "arrived_at,num_prefill_tokens,num_decode_tokens\n5.0,374,44\n6.5,374,0\n"
VOCAB = 49_152


def test_equal_ids_of_a_mooncake_trace_are_equal_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    first, second = read_arrivals(path, 8192)  # the third is too long
    assert [(a.name, a.at_s, a.output_length) for a in (first, second)] == [("r0", 0.0, 7), ("r2", 2.0, 1)]
    one, other = first.request(VOCAB), second.request(VOCAB)
    assert (len(one.prompt), len(other.prompt)) == (1100, 700)
    assert one.prompt[:512] == other.prompt[:512]
    assert one.prompt[512:700] != other.prompt[512:]
    assert one.sampling.max_tokens == 7
    assert one.sampling.ignore_eos


def test_requests_of_one_time_are_spread_until_the_next(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": 10, "output_length": 5, "hash_ids": [1]}}\n'
    path.write_text("".join(line.format(ms) for ms in (3000, 3000, 3000, 6000, 12_000, 12_000)))
    assert [a.at_s for a in read_arrivals(path, 8192)] == pytest.approx([0, 1, 2, 3, 9, 12])
    path.write_text(2 * line.format(3000))
    assert [a.at_s for a in read_arrivals(path, 8192)] == [0, 0]


def test_prompts_of_an_azure_trace_have_nothing_in_common(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    arrivals = read_arrivals(path, 8192)
    assert [(a.at_s, a.input_length, a.output_length) for a in arrivals] == [(0.0, 374, 44), (1.5, 374, 1)]
    one, other = (a.request(VOCAB).prompt for a in arrivals)
    assert one[:16] != other[:16]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE + '{"timestamp": 0}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl, line 4"):
        read_arrivals(path, 8192)


def test_no_two_names_begin_alike() -> None:
    names = [0, 1, 29_999, 30_000, 30_001, 182_789, 1 << 40, (1 << 40) + 1]
    tokens = [tuple(Piece(name, 512).tokens()) for name in names]
    assert len(set(tokens)) == len(names)
    assert all(len(block) == 512 and min(block) >= 0 and max(block) < VOCAB for block in tokens)
    assert Piece(3, 2).tokens() == Piece(3, 9).tokens()[:2]
    assert len(Piece(3, 2000).tokens()) == 2000


def test_sessions_go_on_with_all_that_was_said() -> None:
    arrivals = Sessions(rate=1.0, system_prompts=2, system_length=100, turns=4).arrivals(60, 7, 8192)
    assert arrivals == Sessions(rate=1.0, system_prompts=2, system_length=100, turns=4).arrivals(60, 7, 8192)
    assert arrivals != Sessions(rate=1.0, system_prompts=2, system_length=100, turns=4).arrivals(60, 8, 8192)
    assert len(arrivals) == 60
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    assert len({tuple(a.request(VOCAB).prompt[:100]) for a in arrivals}) == 2
    turns = [a for a in arrivals if a.session == max(arrivals, key=lambda a: len(a.pieces)).session]
    assert len(turns) > 1
    for before, after in pairwise(turns):
        assert after.at_s > before.at_s
        answer = Answer(before.seed, before.input_length, before.output_length)
        prompt = before.request(VOCAB).prompt + answer.tokens(VOCAB)
        assert after.request(VOCAB).prompt[: len(prompt)] == prompt


def test_sessions_end_before_they_are_too_long() -> None:
    with pytest.raises(
        ValueError, match="up to 2750 tokens with its answer, and the longest sequence is 2000"
    ):
        Sessions().arrivals(200, 0, 2000)
    arrivals = Sessions(turns=50, system_length=500).arrivals(200, 0, 2000)
    assert max(a.input_length + a.output_length for a in arrivals) <= 2000


def test_rates_change_the_gaps_and_nothing_else() -> None:
    arrivals = Sessions().arrivals(100, 0, 8192)
    quick = at_rate(arrivals, 50.0)
    span_s = quick[-1].at_s - quick[0].at_s
    assert len(quick) / span_s == pytest.approx(50.0)
    assert [(a.name, a.pieces) for a in quick] == [(a.name, a.pieces) for a in arrivals]
    assert quick[10].at_s / quick[20].at_s == pytest.approx(arrivals[10].at_s / arrivals[20].at_s)
    with pytest.raises(ValueError, match="the rate must be above 0"):
        at_rate(arrivals, 0)
    with pytest.raises(ValueError, match="all at once"):
        at_rate(arrivals[:1], 1)
