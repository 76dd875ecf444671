"""Workloads: the same for the same seed, as long as asked, and sharing what they say they share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from headrace.bench.errors import BenchError
from headrace.bench.files import PromptFile, TraceWorkload, read_trace
from headrace.bench.setup import build_load, build_workload
from headrace.bench.target import Answer, Turn
from headrace.bench.workload import (
    ConversationWorkload,
    Form,
    Lengths,
    RandomWorkload,
    Session,
    Vocabulary,
    Workload,
)
from headrace.config.bench import LoadOptions, WorkloadOptions


def turns(workload: Workload, requests: int, answer: Answer | None = None) -> list[Turn]:
    """All turns, each session answered with `answer`."""
    found = []
    for session in workload.sessions(requests):
        turn = session.next(None)
        while turn is not None:
            found.append(turn)
            turn = session.next(answer or Answer("an answer", None))
    return found


def synthetic(form: Form, seed: int) -> list[Workload]:
    lengths = Lengths(40, 0.5)
    return [
        RandomWorkload(seed, form, lengths, lengths),
        RandomWorkload(seed, form, lengths, lengths, prefixes=3, prefix_len=20),
        ConversationWorkload(seed, form, lengths, lengths, 3, 2.0),
    ]


@pytest.mark.parametrize("form", Form)
def test_a_seed_fixes_every_turn(form: Form) -> None:
    for one, same, other in zip(synthetic(form, 5), synthetic(form, 5), synthetic(form, 6), strict=True):
        assert turns(one, 10) == turns(same, 10)
        assert turns(one, 10) != turns(other, 10)


def test_sessions_do_not_depend_on_each_other() -> None:
    """A session is the same whether or not those before it were played."""

    def sessions() -> list[Session]:
        workload = ConversationWorkload(1, Form.TOKENS, Lengths(9), Lengths(5), 2, 0.0)
        return list(itertools.islice(workload.sessions(None), 4))

    one, other = sessions(), sessions()
    for session in one[:3]:
        session.next(None)
        session.next(Answer(token_ids=[1] * 5))
    assert one[3].next(None) == other[3].next(None)


def test_lengths_are_as_asked_and_ids_in_the_vocabulary() -> None:
    workload = RandomWorkload(0, Form.TOKENS, Lengths(100, 0.25), Lengths(8), Vocabulary(1000))
    found = turns(workload, 300)
    lengths = [len(turn.prompt or ()) for turn in found]
    assert (min(lengths), max(lengths)) == (75, 125)
    assert sum(lengths) / 300 == pytest.approx(100, abs=3)
    assert {turn.max_tokens for turn in found} == {8}
    ids = {token for turn in found for token in turn.prompt or ()}
    assert min(ids) >= 256 and max(ids) <= 999 and len(ids) > 700  # type: ignore[type-var]


def test_a_word_stands_for_each_token_in_chats() -> None:
    (turn,) = turns(RandomWorkload(0, Form.MESSAGES, Lengths(30), Lengths(8)), 1)
    assert turn.messages is not None and turn.prompt is None
    assert len(str(turn.messages[0]["content"]).split()) == 30


@pytest.mark.parametrize("form", Form)
def test_prefixes_are_shared(form: Form) -> None:
    found = turns(RandomWorkload(2, form, Lengths(10), Lengths(4), prefixes=3, prefix_len=50), 60)
    if form is Form.TOKENS:
        begins = {tuple(turn.prompt[:50]) for turn in found if turn.prompt is not None}
        rests = {tuple(turn.prompt[50:]) for turn in found if turn.prompt is not None}
    else:
        begins = {(turn.messages[0]["role"], turn.messages[0]["content"]) for turn in found if turn.messages}
        rests = {(turn.messages[1]["content"],) for turn in found if turn.messages}
    assert len(begins) == 3
    assert len(rests) == 60


def test_a_conversation_grows_by_the_servers_own_answers() -> None:
    workload = ConversationWorkload(0, Form.TOKENS, Lengths(6), Lengths(4), 3, 0.0)
    first, second, third = turns(workload, 3, Answer(token_ids=[7, 8, 9, 10]))
    assert len(first.prompt or ()) == 6
    assert list(second.prompt or ())[:10] == [*(first.prompt or ()), 7, 8, 9, 10]
    assert list(third.prompt or ())[:20] == [*(second.prompt or ()), 7, 8, 9, 10]
    assert workload.notes() == []

    workload = ConversationWorkload(0, Form.TOKENS, Lengths(6), Lengths(4), 3, 0.0)
    again, second, third = turns(workload, 3, Answer("text only"))
    assert again == first
    assert list(second.prompt or ())[:6] == list(first.prompt or ()) and len(second.prompt or ()) == 16
    assert "token ids of 2 answers" in workload.notes()[0]

    chat = turns(ConversationWorkload(0, Form.MESSAGES, Lengths(6), Lengths(4), 3, 0.0), 3, Answer("hello"))
    assert [message["role"] for message in chat[2].messages or ()] == ["user", "assistant"] * 2 + ["user"]
    assert (chat[2].messages or [])[1]["content"] == "hello"


def test_the_number_of_requests_is_exact_and_think_times_have_their_mean() -> None:
    workload = ConversationWorkload(0, Form.TOKENS, Lengths(2), Lengths(1), 4, 3.0)
    assert len(turns(workload, 10)) == 10
    waits = [t.think_s for t in turns(workload, 4000) if t.think_s > 0]
    assert len(waits) == 3000
    assert sum(waits) / 3000 == pytest.approx(3.0, rel=0.08)


# ---- files -------------------------------------------------------------------------------------------


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "one", "max_tokens": 3}, "", {"prompt": [5, 6], "x": 1})
    workload = PromptFile(path, Form.TOKENS, 9)
    assert workload.requests == 2
    assert [(t.prompt, t.max_tokens) for t in turns(workload, 3)] == [("one", 3), ([5, 6], 9), ("one", 3)]
    assert workload.notes() == ["the prompts were gone through 2 times"]
    messages = [{"role": "user", "content": "hi"}]
    path = lines(tmp_path / "m.jsonl", {"messages": messages}, {"prompt": "plain"})
    assert [t.messages or t.prompt for t in turns(PromptFile(path, Form.MESSAGES, 9), 2)] == [
        messages,
        "plain",
    ]


@pytest.mark.parametrize(
    ("form", "row", "complaint"),
    [
        (Form.TOKENS, "not json", "line 2"),
        (Form.TOKENS, {"max_tokens": 3}, "either prompt or messages"),
        (Form.TOKENS, {"prompt": "a", "messages": []}, "either prompt or messages"),
        (Form.TOKENS, {"prompt": ""}, "the prompt is empty"),
        (Form.TOKENS, {"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        (Form.TOKENS, {"prompt": 5}, "line 2"),
        (Form.TOKENS, {"messages": [{"role": "user", "content": "a"}]}, "messages need --endpoint chat"),
        (Form.MESSAGES, {"prompt": [1, 2]}, "token ids need --endpoint completions"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, form: Form, row: object, complaint: str) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(BenchError, match="line 2") as caught:
        PromptFile(path, form, 9)
    assert complaint in str(caught.value)


def mooncake(at_ms: int, length: int, output: int, *hash_ids: int) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": length, "output_length": output, "hash_ids": list(hash_ids)}


TRACE = (
    mooncake(1000, 1200, 5, 0, 1, 2),
    mooncake(1500, 1100, 6, 0, 1, 3),
    mooncake(3000, 600, 7, 0, 4),
    mooncake(3000, 512, 0, 9),
)


def replay(path: Path, form: Form = Form.TOKENS, seed: int = 0, **options: object) -> TraceWorkload:
    return TraceWorkload("t", read_trace(path), form, seed=seed, **options)  # type: ignore[arg-type]


def test_a_mooncake_trace_keeps_its_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    workload = replay(lines(tmp_path / "t.jsonl", *TRACE))
    prompts = [list(turn.prompt or ()) for turn in turns(workload, 4)]
    assert [len(prompt) for prompt in prompts] == [1200, 1100, 600, 512]
    assert [turn.max_tokens for turn in turns(workload, 4)] == [5, 6, 7, 1]
    assert list(workload.due()) == [0.0, 0.5, 2.0, 2.0]

    def shared(a: int, b: int) -> int:
        pairs = zip(prompts[a], prompts[b], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    assert shared(0, 1) == 1024
    assert shared(0, 2) == 512
    assert shared(0, 3) < 8
    assert prompts == [list(turn.prompt or ()) for turn in turns(replay(tmp_path / "t.jsonl"), 4)]
    assert prompts != [list(turn.prompt or ()) for turn in turns(replay(tmp_path / "t.jsonl", seed=1), 4)]
    assert workload.notes() == []


def test_a_chat_of_a_trace_shares_its_words(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", *TRACE)
    texts = [str((t.messages or [{}])[0]["content"]).split() for t in turns(replay(path, Form.MESSAGES), 4)]
    assert [len(words) for words in texts] == [1200, 1100, 600, 512]
    assert texts[0][:1024] == texts[1][:1024]
    assert texts[0][1024:1100] != texts[1][1024:]


def test_clipping_and_scaling_are_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", *TRACE)
    workload = replay(path, time_scale=0.1, max_input_len=600, max_output_len=5)
    prompts = [list(turn.prompt or ()) for turn in turns(workload, 4)]
    assert [len(prompt) for prompt in prompts] == [600, 600, 600, 512]
    assert prompts[0] == prompts[1]
    assert list(workload.due()) == pytest.approx([0.0, 0.05, 0.2, 0.2])
    assert workload.notes() == [
        "the trace's times were multiplied by 0.1",
        "2 of 4 prompts were clipped to 600 tokens",
        "2 of 4 outputs were clipped to 5 tokens",
    ]


def test_an_azure_trace_is_read_and_put_in_order(tmp_path: Path) -> None:
    rows = ("arrived_at,num_prefill_tokens,num_decode_tokens", "4.5,7,3", "0.5,20,9", "")
    workload = replay(lines(tmp_path / "t.csv", *rows))
    found = turns(workload, 2)
    assert [(len(turn.prompt or ()), turn.max_tokens) for turn in found] == [(20, 9), (7, 3)]
    assert list(workload.due()) == [0.0, 4.0]
    assert list(found[0].prompt or ())[:7] != list(found[1].prompt or ())


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ((), "is empty"),
        (("a,b", "1,2"), "neither a Mooncake trace"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "0,x,2"), "line 2"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "0,1"), "line 2"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "0,0,2"), "request 1"),
        (("arrived_at,num_prefill_tokens,num_decode_tokens", "nan,1,2"), "request 1"),
        ((TRACE[0], {"timestamp": 1}), "line 2"),
        ((TRACE[0], mooncake(0, 513, 1, 5)), "1 hash ids for 513 tokens"),
        ((mooncake(0, 5, 1, -1),), "a hash id is negative"),
    ],
)
def test_a_broken_trace_is_refused(tmp_path: Path, rows: tuple[object, ...], complaint: str) -> None:
    path = tmp_path / "t"
    lines(path, *rows)
    with pytest.raises(BenchError, match=complaint):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot read .*nowhere"):
        read_trace(tmp_path / "nowhere")


# ---- from options ------------------------------------------------------------------------------------


def words(load: LoadOptions, workload: Workload | None = None) -> str:
    return build_load(load, workload or build_workload(WorkloadOptions(), Form.TOKENS, 0), 0)[1]


def test_loads_in_words() -> None:
    assert words(LoadOptions()) == "closed loop of 8, 100 requests"
    assert words(LoadOptions(concurrency=2, duration=5)) == "closed loop of 2, for 5 s"
    assert words(LoadOptions(rate=4, num_requests=7)) == "4 requests/s, burstiness 1, 7 requests"
    assert (
        words(LoadOptions(ramp="1:9", num_requests=10, concurrency=3, burstiness=0.5))
        == "from 1 to 9 requests/s over 2.0 s, burstiness 0.5, at most 3 at once, 10 requests"
    )


def test_a_trace_comes_at_its_own_times_unless_a_rate_is_given(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", *TRACE)
    workload = build_workload(WorkloadOptions(dataset="trace", path=path), Form.TOKENS, 0)
    load, said = build_load(LoadOptions(), workload, 0)
    assert said == "at the trace's times, 4 requests"
    assert load.due is not None and list(load.due()) == [0.0, 0.5, 2.0, 2.0]
    assert words(LoadOptions(rate=2), workload) == "2 requests/s, burstiness 1, 4 requests"


@pytest.mark.parametrize(
    ("workload", "load", "complaint"),
    [
        ({"turns": 3}, {}, "--turns has no meaning with --dataset random; it is for multi-turn"),
        ({"dataset": "trace"}, {}, "needs --path"),
        ({"dataset": "file", "input_len": 3}, {}, "--input-len has no meaning with --dataset file"),
        ({"dataset": "shared-prefix", "prefixes": 0}, {}, "at least 1 prefix"),
        ({"dataset": "multi-turn", "turns": 0}, {}, "at least 1 turn"),
        ({"dataset": "multi-turn", "think_time": -1}, {}, "think time"),
        ({"input_len": 0}, {}, "at least 1 token"),
        ({"range_ratio": 1.0}, {}, "range ratio"),
        ({"vocab_size": 1}, {}, "at least 2 token ids"),
        ({}, {"rate": 1, "ramp": "1:2"}, "--rate and --ramp"),
        ({}, {"burstiness": 1}, "--burstiness has no meaning"),
        ({}, {"rate": 0}, "a rate must be above 0"),
        ({}, {"rate": 1, "burstiness": 0}, "burstiness must be above 0"),
        ({}, {"ramp": "1-2"}, "two rates"),
        ({}, {"ramp": "0:2"}, "a rate must be above 0"),
        ({}, {"concurrency": 0}, "concurrency must be at least 1"),
        ({}, {"num_requests": 0}, "number of requests must be at least 1"),
        ({}, {"duration": 0}, "duration must be above 0"),
        ({}, {"timeout": 0}, "timeout must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(
    workload: dict[str, object], load: dict[str, object], complaint: str
) -> None:
    with pytest.raises(BenchError, match=complaint):
        built = build_workload(WorkloadOptions(**workload), Form.TOKENS, 0)  # type: ignore[arg-type]
        build_load(LoadOptions(**load), built, 0)  # type: ignore[arg-type]


def test_a_trace_has_no_more_requests_than_it_has(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", *TRACE)
    workload = build_workload(WorkloadOptions(dataset="trace", path=path), Form.TOKENS, 0)
    with pytest.raises(BenchError, match="the trace has 4 requests, --num-requests is 5"):
        build_load(LoadOptions(num_requests=5), workload, 0)
