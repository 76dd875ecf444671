"""What a request may ask of an engine: the one place that says no before anything is computed.

The gateway asks first, to answer a client at once; the engine asks again, since nothing that arrives may
stop it. All lengths are in tokens.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np

from headrace.protocol.requests import SEED_LIMIT, ErrorCode, GenerateRequest, RequestError, SamplingParams

MAX_SAMPLES = 64
MAX_LOGPROBS = 20


class RequestRefused(Exception):
    """A request that cannot be accepted, with the reason and the limit."""

    def __init__(
        self, code: ErrorCode, message: str, field: str | None = None, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.error = RequestError(code, message, field, retry_after_s)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The two numbers of a served model that every request is held to."""

    max_model_len: int
    vocab_size: int


def num_samples(request: GenerateRequest) -> int:
    """How many samples a request is answered for: n, or as near to it as may be where n is refused."""
    return min(max(1, request.sampling.n), MAX_SAMPLES)


def check_request(request: GenerateRequest, limits: ModelLimits) -> None:
    """Raise RequestRefused, naming the field and its limit, if the request can never be served."""
    length = len(request.prompt)
    if length == 0:
        raise _invalid("prompt", "the prompt has no tokens; send at least one")
    if length >= limits.max_model_len:
        raise _invalid(
            "prompt",
            f"the prompt has {length} tokens; with at least one to generate, the limit is "
            f"{limits.max_model_len - 1} (max_model_len {limits.max_model_len})",
        )
    if not _are_below(request.prompt, limits.vocab_size):
        bad = next(token for token in request.prompt if not 0 <= token < limits.vocab_size)
        raise _invalid("prompt", f"token id {bad} is outside the vocabulary of {limits.vocab_size}")
    _check_sampling(request.sampling, limits)


def _are_below(tokens: list[int], limit: int) -> bool:
    """Whether all are in [0, limit). Packed first: comparing integers of Python takes ten times
    as long."""
    try:
        packed = array("I", tokens)
    except OverflowError:  # negative, or of more than 32 bits
        return all(0 <= token < limit for token in tokens)
    return bool(np.frombuffer(packed, np.uintc).max() < limit)


def _check_sampling(params: SamplingParams, limits: ModelLimits) -> None:
    _within("n", params.n, 1, MAX_SAMPLES)
    _within("max_tokens", params.max_tokens, 1, math.inf)
    _within("min_tokens", params.min_tokens, 0, params.max_tokens)
    _within("temperature", params.temperature, 0.0, 100.0)
    _within("top_k", params.top_k, 0, math.inf)
    _within("min_p", params.min_p, 0.0, 1.0)
    _within("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _within("seed", params.seed, 0, SEED_LIMIT - 1)
    if not 0.0 < params.top_p <= 1.0:
        raise _invalid("top_p", f"top_p must be above 0 and at most 1, got {params.top_p}")
    _within("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    for name in ("logprobs", "prompt_logprobs"):
        if (value := getattr(params, name)) is not None:
            _within(name, value, 0, MAX_LOGPROBS)
    for token, bias in params.logit_bias.items():
        if not 0 <= token < limits.vocab_size:
            raise _invalid("logit_bias", f"token id {token} is outside the vocabulary of {limits.vocab_size}")
        _within("logit_bias", bias, -100.0, 100.0)
    for token in params.stop_token_ids:
        if not 0 <= token < limits.vocab_size:
            raise _invalid(
                "stop_token_ids", f"token id {token} is outside the vocabulary of {limits.vocab_size}"
            )


def _within(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # also false for NaN
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise _invalid(field, f"{field} must be {limits}, got {value}")


def _invalid(field: str, message: str) -> RequestRefused:
    return RequestRefused(ErrorCode.INVALID, message, field)
