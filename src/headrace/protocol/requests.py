"""A generation request as the engine sees it, and what comes back.

Text never appears here: the gateway tokenises, detokenises and watches for stop strings.
"""

from __future__ import annotations

import enum

import msgspec

SEED_LIMIT = 1 << 64


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of a request are chosen. Every limit counts tokens.

    The order of processing is: penalties, logit bias, forbidden stops (min_tokens), temperature,
    top-k, top-p, min-p, Gumbel noise keyed by (seed, position), argmax. A temperature of 0 is greedy.
    """

    max_tokens: int
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """In [0, 2^64). Sample i of n uses `sample_seed(seed, i)`."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """Alternatives reported per output token, beside the token itself; None reports nothing."""
    prompt_logprobs: int | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt, to be continued `sampling.n` times."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    model: str = ""
    """Which of the gateway's models; empty is its first. Workers, which have one, are not told."""
    priority: int = 0
    """Lower is more urgent; equal priorities are served in order of arrival."""
    cache_salt: str = ""
    """Requests share cached blocks only with requests of the same salt (a tenant's own cache)."""
    session: str = ""
    """Requests of one session are better served by the worker that served it before."""
    tenant: str = ""
    """Who asks: among requests of equal urgency tenants take turns."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a request had come in earlier attempts; the next one goes on from there and repeats nothing.

    Which worker computes an attempt is no part of the answer: a token depends on the tokens before it, the
    sample's seed and its position.
    """

    generated: dict[int, list[int]] = {}
    """Output tokens by sample; a sample that is not named has none."""
    ended: list[int] = []
    """Samples that are not to be run."""
    prompt_logprobs_told: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities at one position, before any sampling processor.

    The chosen (or prompt) token, its rank among all tokens (1 is the most likely), and the most likely
    alternatives in order.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # the client left, or asked
    ERROR = "error"


class ErrorCode(enum.StrEnum):
    """Why a request failed: what the HTTP layer turns into a status."""

    INVALID = "invalid"  # the request can never be served as it is
    OVERLOADED = "overloaded"  # a queue is full: try again later
    OUT_OF_BLOCKS = "out_of_blocks"  # it grew past the KV cache while alone in it
    UNAVAILABLE = "unavailable"  # no engine, or the engine ended under the request
    INTERNAL = "internal"


class RequestError(msgspec.Struct, frozen=True):
    """The text says what was wrong, the limit, and what to do."""

    code: ErrorCode
    message: str
    field: str | None = None
    retry_after_s: int | None = None
    """When it may be served, where that can be foreseen."""


class Finish(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one terminal outcome of a sequence."""

    reason: FinishReason
    stop_token: int | None = None
    error: RequestError | None = None


class SequenceOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step added to one sequence of a request."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Positions 1 onwards of the prompt, once, with the first output of sample 0."""
    cached_tokens: int | None = None
    """Prompt tokens whose keys and values came from the prefix cache; with the first output."""
    finish: Finish | None = None


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index`: the request's own for the first, so n=1 and n=3 begin alike."""
    return (seed + index * 0x9E3779B97F4A7C15) % SEED_LIMIT
