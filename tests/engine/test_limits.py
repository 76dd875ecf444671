"""Every refusal names its field and the limit; everything at a limit passes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headrace.engine import ModelLimits, RequestRefused, check_request, num_samples
from headrace.engine.limits import MAX_LOGPROBS, MAX_SAMPLES
from headrace.protocol.requests import SEED_LIMIT, ErrorCode, GenerateRequest, SamplingParams

LIMITS = ModelLimits(max_model_len=10, vocab_size=50)


def check(prompt: list[int] | None = None, **params: Any) -> None:
    sampling = SamplingParams(**{"max_tokens": 8, **params})
    check_request(GenerateRequest(request_id="r", prompt=prompt or [1, 2], sampling=sampling), LIMITS)


AT_THE_LIMIT: list[dict[str, Any]] = [
    {"prompt": [0, 49] * 4 + [1]},
    {"n": 1},
    {"n": MAX_SAMPLES},
    {"max_tokens": 1},
    {"max_tokens": 10**9},
    {"min_tokens": 8},
    {"temperature": 0.0},
    {"temperature": 100.0},
    {"top_p": 1e-9},
    {"top_p": 1.0},
    {"top_k": 10**6},
    {"min_p": 1.0},
    {"repetition_penalty": 100.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"seed": SEED_LIMIT - 1},
    {"logprobs": 0},
    {"logprobs": MAX_LOGPROBS},
    {"prompt_logprobs": MAX_LOGPROBS},
    {"logit_bias": {0: -100.0, 49: 100.0}},
    {"stop_token_ids": (0, 49)},
]

PAST_IT: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": [1] * 10}, "prompt", "has 10 tokens; .* limit is 9"),
    ({"prompt": [1, 50]}, "prompt", "token id 50 .* vocabulary of 50"),
    ({"prompt": [1, -1]}, "prompt", "token id -1"),
    ({"n": 0}, "n", "n must be from 1 to 64, got 0"),
    ({"n": MAX_SAMPLES + 1}, "n", "got 65"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"min_tokens": 9}, "min_tokens", "from 0 to 8, got 9"),
    ({"temperature": -0.1}, "temperature", "from 0.0"),
    ({"temperature": math.nan}, "temperature", "got nan"),
    ({"temperature": math.inf}, "temperature", "got inf"),
    ({"top_p": 0.0}, "top_p", "above 0 and at most 1"),
    ({"top_p": math.nan}, "top_p", "got nan"),
    ({"top_k": -1}, "top_k", "at least 0"),
    ({"min_p": 1.1}, "min_p", "from 0.0 to 1.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "from 0.01 to 100"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2.0 to 2.0"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "from -2.0 to 2.0"),
    ({"seed": SEED_LIMIT}, "seed", "got 18446744073709551616"),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs", "from 0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "got -1"),
    ({"logit_bias": {50: 1.0}}, "logit_bias", "token id 50"),
    ({"logit_bias": {1: math.nan}}, "logit_bias", "got nan"),
    ({"stop_token_ids": (50,)}, "stop_token_ids", "token id 50"),
]


@pytest.mark.parametrize("options", AT_THE_LIMIT, ids=str)
def test_what_is_at_a_limit_passes(options: dict[str, Any]) -> None:
    check(**options)


@pytest.mark.parametrize(("options", "field", "reason"), PAST_IT, ids=str)
def test_what_is_past_a_limit_is_refused_by_name(options: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RequestRefused, match=reason) as refused:
        check(**options)
    assert (refused.value.error.code, refused.value.error.field) == (ErrorCode.INVALID, field)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestRefused, match="no tokens"):
        check_request(
            GenerateRequest(request_id="r", prompt=[], sampling=SamplingParams(max_tokens=1)), LIMITS
        )


@pytest.mark.parametrize(("n", "answered"), [(-5, 1), (0, 1), (1, 1), (7, 7), (64, 64), (10**15, 64)])
def test_a_request_is_answered_a_bounded_number_of_times(n: int, answered: int) -> None:
    sampling = SamplingParams(max_tokens=1, n=n)
    assert num_samples(GenerateRequest(request_id="r", prompt=[1], sampling=sampling)) == answered
