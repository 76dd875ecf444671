"""Chat completions, with the official client."""

from __future__ import annotations

import random
from typing import Any

import httpx
import openai
import orjson
import pytest
from api_house import ApiHouse

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo 👋"}]
RENDERED = "<|sep|>system: Be brief.<|sep|>user: Héllo 👋<|sep|>assistant:"


@pytest.fixture
def prompt(house: ApiHouse) -> list[int]:
    return house.tokenizer.encode(RENDERED, add_special_tokens=False)


def test_the_template_makes_the_prompt(house: ApiHouse, client: openai.OpenAI, prompt: list[int]) -> None:
    answer = client.chat.completions.create(model="hash", messages=MESSAGES, temperature=0, max_tokens=20)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == house.expected_text(prompt, max_tokens=20)
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_max_completion_tokens_goes_first_and_without_either_the_context_is_the_limit(
    house: ApiHouse, client: openai.OpenAI, prompt: list[int]
) -> None:
    def tokens(**limits: Any) -> int:
        answer = client.chat.completions.create(
            model="hash", messages=MESSAGES, extra_body={"ignore_eos": True}, **limits
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    assert tokens(max_completion_tokens=3, max_tokens=9) == 3
    assert tokens(max_tokens=9) == 9
    assert tokens() == house.shape.max_model_len - len(prompt)
    assert tokens(max_tokens=10**30) == house.shape.max_model_len - len(prompt)


def test_a_stream_tells_role_text_finish_and_usage(
    house: ApiHouse, client: openai.OpenAI, prompt: list[int]
) -> None:
    stream = client.chat.completions.create(
        model="hash",
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == house.expected_text(prompt, max_tokens=20)
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_usage_is_not_sent_where_it_is_not_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="hash", messages=MESSAGES, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_several_choices_stream_beside_each_other(
    house: ApiHouse, client: openai.OpenAI, prompt: list[int]
) -> None:
    stream = client.chat.completions.create(
        model="hash", messages=MESSAGES, n=3, seed=5, max_tokens=15, stream=True
    )
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for index, text in texts.items():
        alone = house.expected(prompt, index, temperature=1.0, seed=5, max_tokens=15, n=3)
        assert text == house.tokenizer.decode(alone.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_give_bytes_and_alternatives(
    house: ApiHouse, client: openai.OpenAI, prompt: list[int], stream: bool
) -> None:
    alone = house.expected(prompt, max_tokens=10, logprobs=2, ignore_eos=True)
    answer: Any = client.chat.completions.create(
        model="hash",
        messages=MESSAGES,
        temperature=0,
        max_tokens=10,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    if stream:
        entries = [e for c in answer if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx([e.logprob for e in alone.logprobs])
    spelled = [bytes(entry.bytes) for entry in entries]
    assert spelled == [house.tokenizer.token_bytes(token) for token in alone.tokens]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_null_means_not_sent_and_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("stop", "temperature", "top_p", "n", "stream", "logit_bias", "tools", "response_format", "user")
    )
    extra = {**nothing, "max_tokens": 2, "store": True, "metadata": {"a": 1}, "verbosity": "low"}
    answer = client.chat.completions.create(model="hash", messages=MESSAGES, extra_body=extra)
    assert answer.choices[0].finish_reason == "length"


def test_arguments_reach_the_template(house: ApiHouse, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="hash",
        messages=[{"role": "user", "content": [{"type": "text", "text": "ab"}]}],
        temperature=0,
        max_tokens=4,
        extra_body={"add_generation_prompt": False, "chat_template_kwargs": {"shout": True}},
    )
    prompt = house.tokenizer.encode("<|sep|>user: ab!", add_special_tokens=False)
    assert answer.choices[0].message.content == house.expected_text(prompt, max_tokens=4)


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_says_the_same_as_a_whole_answer(http: httpx.Client, seed: int) -> None:
    generator = random.Random(seed)
    body: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": generator.choice(["a", "bb", "ccc"]) * generator.randrange(9)}
        ],
        "seed": seed,
        "max_tokens": generator.randrange(1, 60),
        "n": generator.choice([1, 1, 2, 4]),
        "stop": generator.sample(
            ["w1", " w4", "99", "\N{REPLACEMENT CHARACTER}", "7 w"], generator.randrange(4)
        ),
        "min_tokens": generator.choice([0, 0, 1]),
        "include_stop_str_in_output": generator.random() < 0.3,
        "logprobs": generator.random() < 0.3,
    }
    whole = http.post("/v1/chat/completions", json=body).json()
    body.update(stream=True, stream_options={"include_usage": True})
    streamed = http.post("/v1/chat/completions", json=body)
    texts = [""] * body["n"]
    ends: list[Any] = [None] * body["n"]
    logprobs: list[list[Any]] = [[] for _ in texts]
    events = [orjson.loads(e[6:]) for e in streamed.text.split("\n\n")[:-2]]
    for event in events:
        for choice in event["choices"]:
            assert ends[choice["index"]] is None
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["logprobs"]:
                logprobs[choice["index"]] += choice["logprobs"]["content"]
            if choice["finish_reason"]:
                ends[choice["index"]] = (choice["finish_reason"], choice["stop_reason"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [(choice["finish_reason"], choice["stop_reason"]) for choice in whole["choices"]]
    if body["logprobs"]:
        assert logprobs == [choice["logprobs"]["content"] for choice in whole["choices"]]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [events[-1]["usage"][c] for c in counts] == [whole["usage"][c] for c in counts]
