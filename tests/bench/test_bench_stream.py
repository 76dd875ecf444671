"""Streams of events to times, tokens and failures."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import token, usage

from headrace.bench.errors import FailureKind, RequestFailed
from headrace.bench.record import Counted, share_out
from headrace.bench.sse import MAX_EVENT_BYTES, EventParser
from headrace.bench.stream import StreamReader

STREAM = (
    b": a comment\n\n"
    b'data: {"a": 1}\n\n'
    b"event: x\r\ndata: one\r\ndata:two\r\nid: 7\r\n\r\n"
    b"\n\n"
    b"data: three\r\r"
    b"data:\xc3\xa9\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"one\ntwo", b"three", "é".encode(), b"[DONE]"]


@given(st.lists(st.integers(1, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    parser = EventParser()
    places = sorted({0, *cuts, len(STREAM)})
    events = [e for a, b in pairwise(places) for e in parser.feed(STREAM[a:b])]
    assert events == EVENTS
    assert parser.pending == 0


def test_events_byte_by_byte() -> None:
    parser = EventParser()
    assert [e for i in range(len(STREAM)) for e in parser.feed(STREAM[i : i + 1])] == EVENTS


def test_an_event_without_end_is_given_up() -> None:
    parser = EventParser()
    with pytest.raises(ValueError, match="an event of more than"):
        for _ in range(3):
            parser.feed(b"x" * (MAX_EVENT_BYTES // 2 + 1))


def read(
    *events: object, status: int = 200, kind: str = "text/event-stream", done: bool = True
) -> StreamReader:
    """A reader that has been given each event a second after the one before."""
    reader = StreamReader()
    reader.sent(0.0)
    reader.head(status, {"content-type": kind})
    for at, event in enumerate(events, 1):
        data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
        reader.piece(data, float(at))
    if done:
        reader.piece(b"data: [DONE]\n\n", float(len(events) + 1))
    return reader


def kind_of_failure(reader: StreamReader) -> str:
    with pytest.raises(RequestFailed) as caught:
        reader.check()
    return caught.value.failure.kind


def delta(finish_reason: str | None = None, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def test_the_opening_and_the_closing_of_a_message_are_no_tokens() -> None:
    reader = read(
        delta(role="assistant", content=""),
        delta(content="Hel"),
        delta(content=""),  # a token whose text is held back
        delta(content="lo", finish_reason="stop"),
        delta(finish_reason="stop"),
        usage(5, 3),
    )
    reader.check()
    assert reader.times == [2.0, 3.0, 4.0]
    assert reader.sizes() == [1, 1, 1]
    assert "".join(reader.text) == "Hello"
    assert reader.usage is not None and reader.usage.prompt_tokens == 5


def test_reasoning_and_tool_calls_are_tokens() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    heard: list[tuple[str, bool]] = []
    reader = StreamReader(on_text=lambda text, reasoning: heard.append((text, reasoning)))
    reader.head(200, {"content-type": "text/event-stream; charset=utf-8"})
    for event in (delta(reasoning_content="hm"), delta(content="yes"), delta(tool_calls=[call])):
        reader.piece(b"data: " + json.dumps(event).encode() + b"\n\n", 0.0)
    assert heard == [("hm", True), ("yes", False), ("f{}", False)]
    assert len(reader.times) == 3


def test_token_ids_say_how_many_tokens_a_chunk_has() -> None:
    reader = read(
        token("a", token_ids=[1]), token("", token_ids=[2, 3]), token("b", token_ids=[4]), usage(1, 4)
    )
    assert reader.sizes() == [1, 2, 1]
    assert reader.counted is Counted.IDS
    assert reader.token_ids == [1, 2, 3, 4]


def test_a_running_count_says_how_many_tokens_a_chunk_has() -> None:
    first = token("abc") | {"usage": {"prompt_tokens": 1, "completion_tokens": 3}}
    second = token("d") | {"usage": {"prompt_tokens": 1, "completion_tokens": 4}}
    reader = read(first, second, usage(1, 4))
    assert reader.sizes() == [3, 1]
    assert reader.counted is Counted.USAGE


def test_without_a_count_the_total_is_shared_out_by_length() -> None:
    reader = read(token("aaaaaaaa"), token("aa"), usage(1, 6))
    assert reader.sizes() == [4, 2]
    assert reader.counted is Counted.TEXT


def test_without_usage_chunks_are_counted() -> None:
    reader = read(token("aaaaaaaa"), token("aa"))
    assert reader.sizes() == [1, 1]
    assert reader.counted is Counted.CHUNKS


@given(st.integers(0, 500), st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_shares_add_up_and_follow_the_lengths(total: int, weights: list[int]) -> None:
    sizes = share_out(total, weights)
    assert sum(sizes) == max(total, len(weights))
    assert min(sizes) >= 1
    extra = max(0, total - len(weights))
    whole = sum(weights)
    for size, weight in zip(sizes, weights, strict=True):
        exact = 1 + extra * (weight / whole if whole else 1 / len(weights))
        assert abs(size - exact) < 1 + 1e-9


def test_every_bad_answer_has_its_kind() -> None:
    refusal = {"error": {"message": "out of blocks", "code": 500}}
    assert kind_of_failure(read(refusal)) == FailureKind.REFUSED
    assert kind_of_failure(read(token(), refusal)) == FailureKind.REFUSED
    assert kind_of_failure(read(token(), done=False)) == FailureKind.DISCONNECTED
    assert kind_of_failure(read(usage(5, 0))) == FailureKind.EMPTY
    assert kind_of_failure(read(b"data: {not json}\n\n")) == FailureKind.MALFORMED
    assert kind_of_failure(read(b'data: {"choices": "none"}\n\n')) == FailureKind.MALFORMED
    assert kind_of_failure(read(b"data: \xff\xfe\n\n")) == FailureKind.MALFORMED
    assert (
        kind_of_failure(read(token(finish_reason="stop"), b'data: {"cho', done=False))
        == FailureKind.MALFORMED
    )
    assert kind_of_failure(read(b"<html>", kind="text/html", done=False)) == FailureKind.MALFORMED
    assert kind_of_failure(read(b"{}", status=429, done=False)) == "http_429"


def test_the_servers_own_words_are_kept() -> None:
    reader = read(b'{"error": {"message": "slow down", "type": "x"}}', status=429, done=False)
    with pytest.raises(RequestFailed, match="slow down"):
        reader.check()
    reader = read(b"Bad Gateway", status=502, done=False)
    with pytest.raises(RequestFailed, match="Bad Gateway"):
        reader.check()


def test_an_error_of_null_is_none() -> None:
    read(token() | {"error": None}).check()
