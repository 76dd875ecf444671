"""Token ids for clients that ask for them: /tokenize, /detokenize, and `return_token_ids`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from api_house import SEPARATOR, ApiHouse

from headrace import __version__

MESSAGES = [{"role": "user", "content": "hi"}]


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_is_tokenised_and_comes_back(house: ApiHouse, http: httpx.Client) -> None:
    answer = post(http, "/tokenize", {"prompt": "hé", "model": "hash"})
    tokens = house.tokenizer.encode("hé")
    assert answer == {"count": 3, "max_model_len": 512, "tokens": tokens, "token_strs": None}
    spelled = post(http, "/tokenize", {"prompt": "ab", "return_token_strs": True})
    assert spelled["token_strs"] == ["a", "b"]
    assert post(http, "/detokenize", {"tokens": tokens}) == {"prompt": "hé"}
    assert post(http, "/detokenize", {"tokens": [SEPARATOR]}) == {"prompt": "<|sep|>"}
    assert post(http, "/detokenize", {"tokens": []}) == {"prompt": ""}
    assert post(http, "/tokenize", {"prompt": ""})["tokens"] == []


def test_a_conversation_is_tokenised_as_the_model_gets_it(house: ApiHouse, http: httpx.Client) -> None:
    def text(**fields: Any) -> str:
        return house.tokenizer.decode(
            post(http, "/tokenize", {"messages": MESSAGES, **fields})["tokens"], skip_special_tokens=False
        )

    assert text() == "<|sep|>user: hi<|sep|>assistant:"
    assert text(add_generation_prompt=False) == "<|sep|>user: hi"
    assert text(chat_template_kwargs={"shout": True}) == "<|sep|>user: hi!<|sep|>assistant:"
    usage = post(http, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1})["usage"]
    assert usage["prompt_tokens"] == post(http, "/tokenize", {"messages": MESSAGES})["count"]


def test_the_version_is_told(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = http.post(path, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("stop", [False, True])
def test_a_completion_with_its_token_ids(house: ApiHouse, http: httpx.Client, stop: bool) -> None:
    prompts = [[300, 301], [302]]
    expected = [house.expected(prompt, max_tokens=12, ignore_eos=True).tokens for prompt in prompts]
    body = {
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if stop:
        text = house.tokenizer.decode(expected[0])
        body["stop"] = text[text.index(" w", 20) : text.index(" w", 20) + 5]
    whole = post(http, "/v1/completions", body)["choices"]
    parts = events(http, "/v1/completions", body)
    for number, prompt in enumerate(prompts):
        assert whole[number]["prompt_token_ids"] == prompt
        tokens = whole[number]["token_ids"]
        assert tokens == expected[number][: len(tokens)]
        assert stop or tokens == expected[number]
        own = [c for part in parts for c in part["choices"] if c["index"] == number]
        assert own[0]["prompt_token_ids"] == prompt
        assert all("prompt_token_ids" not in choice for choice in own[1:])
        assert [token for choice in own for token in choice["token_ids"]] == tokens
    assert whole[0]["finish_reason"] == ("stop" if stop else "length")
    assert len(whole[0]["token_ids"]) < 12 or not stop
    body["return_token_ids"] = False
    assert "token_ids" not in str(post(http, "/v1/completions", body))


def test_an_echo_of_nothing_but_the_prompt_has_no_token_ids(http: httpx.Client) -> None:
    body = {"prompt": [65, 66], "echo": True, "max_tokens": 0, "return_token_ids": True}
    (choice,) = post(http, "/v1/completions", body)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([65, 66], [])


def test_a_chat_with_its_token_ids(house: ApiHouse, http: httpx.Client) -> None:
    prompt = post(http, "/tokenize", {"messages": MESSAGES})["tokens"]
    expected = house.expected(prompt, max_tokens=9, ignore_eos=True).tokens
    body = {
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 9,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    whole = post(http, "/v1/chat/completions", body)
    assert whole["prompt_token_ids"] == prompt
    assert whole["choices"][0]["token_ids"] == expected
    parts = events(http, "/v1/chat/completions", body)
    assert parts[0]["prompt_token_ids"] == prompt
    pieces = [choice.get("token_ids", []) for part in parts for choice in part["choices"]]
    assert [token for piece in pieces for token in piece] == expected
