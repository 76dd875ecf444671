"""Text completions: what comes back is what the model says, in every form in which it can be asked for."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from api_house import EOS, SEPARATOR, ApiHouse

from headrace.api.logprobs import completion_logprobs
from headrace.protocol.requests import TokenLogprobs

PROMPT = "Once upon a time"


@pytest.fixture
def prompt(house: ApiHouse) -> list[int]:
    return house.tokenizer.encode(PROMPT)


def test_text_is_what_the_model_says(house: ApiHouse, client: openai.OpenAI, prompt: list[int]) -> None:
    answer = client.completions.create(model="hash", prompt=PROMPT, temperature=0, max_tokens=20)
    (choice,) = answer.choices
    assert choice.text == house.expected_text(prompt, max_tokens=20)
    assert choice.finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)
    assert answer.usage.total_tokens == len(prompt) + 20


def test_sixteen_tokens_where_nothing_is_said(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="hash", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_token_ids_and_several_prompts_keep_their_order(house: ApiHouse, client: openai.OpenAI) -> None:
    prompts = [[5, 6, 7], [8], [9, 10]]
    answer = client.completions.create(
        model="hash",
        prompt=prompts,
        n=2,
        temperature=1,
        seed=11,
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        prompt, sample = prompts[choice.index // 2], choice.index % 2
        alone = house.expected(prompt, sample, temperature=1.0, seed=11, max_tokens=5, n=2, ignore_eos=True)
        assert choice.text == house.tokenizer.decode(alone.tokens)
    texts = client.completions.create(model="hash", prompt=["ab", "c"], temperature=0, max_tokens=3)
    assert [choice.text for choice in texts.choices] == [
        house.expected_text(house.tokenizer.encode(text), max_tokens=3) for text in ("ab", "c")
    ]


def test_an_end_token_and_a_stop_token_end_the_text_and_are_not_part_of_it(
    house: ApiHouse, client: openai.OpenAI
) -> None:
    ends = (([i], house.expected([i], max_tokens=400).tokens) for i in range(900))
    prompt, tokens = next((p, t) for p, t in ends if t[-1] == EOS and len(t) > 20)
    answer = client.completions.create(model="hash", prompt=prompt, temperature=0, max_tokens=400)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == house.tokenizer.decode(tokens)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokens)

    stop = next(token for token in tokens[3:] if 256 < token < SEPARATOR and token not in tokens[:3])
    at = tokens.index(stop)
    for include in (False, True):
        answer = client.completions.create(
            model="hash",
            prompt=prompt,
            temperature=0,
            max_tokens=400,
            extra_body={"stop_token_ids": [stop], "include_stop_str_in_output": include},
        )
        assert answer.choices[0].text == house.tokenizer.decode(tokens[: at + include])
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].stop_reason == stop  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_ends_the_text(
    house: ApiHouse, http: httpx.Client, prompt: list[int], include: bool, stream: bool
) -> None:
    text = house.expected_text(prompt, max_tokens=60, ignore_eos=True)
    at = text.index(" w", 20)
    stop = text[at + 1 : at + 7]  # from the middle of one word into the next
    at = text.index(stop)
    body = {
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 60,
        "stop": ["never", stop],
        "include_stop_str_in_output": include,
        "ignore_eos": True,
        "stream": stream,
    }
    choices = ask(http, body)
    assert choices[0]["text"] == text[: at + len(stop) * include]
    assert choices[0]["finish_reason"] == "stop"
    assert choices[0]["stop_reason"] == stop


@pytest.mark.parametrize("stream", [False, True])
def test_what_only_began_like_a_stop_string_is_sent_at_the_end(
    house: ApiHouse, http: httpx.Client, prompt: list[int], stream: bool
) -> None:
    text = house.expected_text(prompt, max_tokens=20, ignore_eos=True)
    body = {
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 20,
        "stop": text[-4:] + "never",
        "ignore_eos": True,
        "stream": stream,
    }
    (choice,) = ask(http, body)
    assert choice["text"] == text
    assert choice["finish_reason"] == "length"


def test_a_stopped_choice_is_not_computed_any_further(house: ApiHouse, http: httpx.Client) -> None:
    def generated() -> float:
        lines = house.metrics.text().decode().splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("headrace:generation_tokens_total"))

    def tokens(sample: int) -> list[int]:
        alone = house.expected([50], sample, temperature=1.0, seed=3, n=2, max_tokens=400, ignore_eos=True)
        found: list[int] = alone.tokens
        return found

    other = set(tokens(1))
    stop = next(token for token in tokens(0)[5:] if 256 < token < SEPARATOR and token not in other)
    word = house.tokenizer.decode([stop])
    before = house.do(generated)
    body = {"prompt": [50], "n": 2, "seed": 3, "max_tokens": 400, "ignore_eos": True, "stop": word + " "}
    first, second = ask(http, body)
    assert first["finish_reason"] == "stop"
    assert second["finish_reason"] == "length"
    assert 400 < house.do(generated) - before < 600


def test_stop_strings_and_ends_wait_for_min_tokens(house: ApiHouse, client: openai.OpenAI) -> None:
    prompt = [33, 44]
    text = house.expected_text(prompt, max_tokens=30, min_tokens=20)
    stop = text[3:6]
    answer = client.completions.create(
        model="hash", prompt=prompt, temperature=0, max_tokens=30, stop=stop, extra_body={"min_tokens": 20}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 20
    assert answer.choices[0].text.startswith(text[:6])


def test_a_seed_repeats_a_text_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return (
            client.completions.create(model="hash", prompt=PROMPT, seed=seed, max_tokens=12).choices[0].text
        )

    assert text(1) == text(1)
    assert text(-1) == text(-1)
    assert len({text(None) for _ in range(4)} | {text(1), text(2)}) == 6


def test_the_cache_shows_in_usage_and_is_apart_for_each_salt(client: openai.OpenAI) -> None:
    prompt = list(range(100, 180))

    def cached(salt: str) -> int | None:
        answer = client.completions.create(
            model="hash", prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("one") == 0
    assert cached("one") == 76  # whole blocks of 4, and the last token is always computed
    assert cached("two") == 0


def test_logprobs_name_each_token_and_where_it_lies(
    house: ApiHouse, client: openai.OpenAI, prompt: list[int]
) -> None:
    answer = client.completions.create(
        model="hash", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=3, extra_body={"ignore_eos": True}
    )
    choice = answer.choices[0]
    alone = house.expected(prompt, max_tokens=12, logprobs=3, ignore_eos=True)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in alone.logprobs])
    assert choice.logprobs.tokens is not None
    in_part = [token.startswith("bytes:") for token in choice.logprobs.tokens]
    names = [name for name, part in zip(choice.logprobs.tokens, in_part, strict=True) if not part]
    assert "".join(names) == choice.text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert choice.logprobs.text_offset is not None
    for offset, token, part in zip(choice.logprobs.text_offset, choice.logprobs.tokens, in_part, strict=True):
        assert part or choice.text[offset:].startswith(token)
    assert choice.logprobs.top_logprobs is not None
    assert all(3 <= len(top) <= 4 for top in choice.logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_are_named_by_their_bytes(
    house: ApiHouse, http: httpx.Client, stream: bool
) -> None:
    prompt = house.tokenizer.encode("é\U0001f600")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 20, "echo": True}
    (choice,) = ask(http, {**body, "ignore_eos": True, "stream": stream})
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("é\U0001f600")
    parts = [f"bytes:\\x{byte:02x}" for byte in "é\U0001f600".encode()]
    assert logprobs["tokens"][:6] == parts == [r"bytes:\xc3", r"bytes:\xa9", *parts[2:]]
    assert logprobs["text_offset"][:6] == [0, 0, 1, 1, 1, 1]
    alone = house.expected(prompt, max_tokens=12, logprobs=20, prompt_logprobs=20, ignore_eos=True)
    several = 0
    told = (*alone.prompt_logprobs, *alone.logprobs)
    for entry, found in zip(told, logprobs["top_logprobs"][1:], strict=True):
        known = dict([*entry.top, (entry.token, entry.logprob)])
        assert sorted(found.values()) == pytest.approx(sorted(known.values()))
        several += sum(name.startswith("bytes:") for name in found)
    assert several > len(told), "the model names too few parts of characters to tell"


def test_of_two_tokens_with_one_name_the_more_likely_is_kept_and_the_chosen_always() -> None:
    class Twins:
        def token_bytes(self, token: int) -> bytes:
            return b"same" if token < 3 else b"other"

    tokenizer: Any = Twins()
    top = [(1, -0.5), (2, -1.0), (3, -1.5)]
    likely = TokenLogprobs(3, -1.5, 3, top)
    chosen = TokenLogprobs(0, -9.0, 9, top)
    found = completion_logprobs(tokenizer, [likely, chosen], [3, 0], ["other", "same"], 0)["top_logprobs"]
    assert found == [{"same": -0.5, "other": -1.5}, {"same": -9.0, "other": -1.5}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_text(
    house: ApiHouse, http: httpx.Client, prompt: list[int], stream: bool
) -> None:
    body = {
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 6,
        "echo": True,
        "logprobs": 2,
        "stream": stream,
    }
    alone = house.expected(prompt, max_tokens=6, logprobs=2, prompt_logprobs=2)
    (choice,) = ask(http, body)
    assert choice["text"] == PROMPT + house.tokenizer.decode(alone.tokens)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    told = [entry.logprob for entry in (*alone.prompt_logprobs, *alone.logprobs)]
    assert logprobs["token_logprobs"][1:] == pytest.approx(told)
    assert logprobs["text_offset"][: len(prompt)] == list(range(len(prompt)))

    (scored,) = ask(http, {**body, "max_tokens": 0})
    assert scored["text"] == PROMPT
    assert len(scored["logprobs"]["tokens"]) == len(prompt)
    assert scored["finish_reason"] == "length"


def test_scoring_a_prompt_counts_no_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="hash", prompt=PROMPT, echo=True, max_tokens=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].text == PROMPT


def test_prompt_logprobs_as_vllm_has_them(house: ApiHouse, http: httpx.Client) -> None:
    prompt = [70, 300, 71]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 2, "prompt_logprobs": 2, "n": 2}
    first, second = ask(http, body)
    alone = house.expected(prompt, max_tokens=2, prompt_logprobs=2)
    assert first["prompt_logprobs"][0] is None
    for position, entry in zip(first["prompt_logprobs"][1:], alone.prompt_logprobs, strict=True):
        assert position[str(entry.token)]["rank"] == entry.rank
        assert position[str(entry.token)]["logprob"] == pytest.approx(entry.logprob)
    assert "prompt_logprobs" not in second


def test_special_tokens_are_left_out_unless_asked_for(house: ApiHouse, client: openai.OpenAI) -> None:
    prompt = next(
        p
        for p in ([1, i] for i in range(900))
        if SEPARATOR in house.expected(p, max_tokens=100, ignore_eos=True).tokens
    )

    def text(skip: bool) -> str:
        extra = {"skip_special_tokens": skip, "ignore_eos": True}
        answer = client.completions.create(
            model="hash", prompt=prompt, temperature=0, max_tokens=100, extra_body=extra
        )
        return answer.choices[0].text

    assert "<|sep|>" not in text(True)
    assert "<|sep|>" in text(False)


def ask(http: httpx.Client, body: dict[str, object]) -> list[dict[str, object]]:
    """The choices of an answer; those of a stream are put together."""
    import orjson

    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["choices"]
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices: dict[int, dict] = {}
    for event in events[:-2]:
        for choice in orjson.loads(event.removeprefix("data: "))["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "logprobs": None})
            whole["text"] += choice["text"]
            if choice["logprobs"] is not None:
                logprobs = whole["logprobs"] or {key: [] for key in choice["logprobs"]}
                whole["logprobs"] = {key: logprobs[key] + choice["logprobs"][key] for key in logprobs}
            assert whole.get("finish_reason") is None, "a choice goes on after its end"
            whole.update({k: v for k, v in choice.items() if k not in ("text", "logprobs")})
    assert all(choice["finish_reason"] for choice in choices.values())
    return [choices[index] for index in sorted(choices)]
