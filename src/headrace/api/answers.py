"""What comes back, as the OpenAPI document tells it. Routes write these objects by hand, for speed; the
models are what they are held to by the tests.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.api.request_ids import HEADER as REQUEST_ID


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Every error, whatever its status."""

    error: ErrorObject


class CachedTokens(_Answer):
    cached_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptToken(_Answer):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
FinishReason = Literal["stop", "length"]


class ChatAlternative(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatAlternative):
    top_logprobs: list[ChatAlternative]


class ChatLogprobs(_Answer):
    content: list[ChatToken]
    refusal: None


class Message(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatAnswer(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class Delta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class TextLogprobs(_Answer):
    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class TextChunkChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextChoice(TextChunkChoice):
    finish_reason: FinishReason


class TextAnswer(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunk(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    versions: dict[str, float] | None = None
    """The share of each model, of a name that stands for several."""


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Answer):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Answer):
    prompt: str


class StateAnswer(_Answer):
    status: Literal["starting", "ready", "draining", "dead"]


class VersionAnswer(_Answer):
    version: str


class WorkerBlocks(_Answer):
    total: int
    held: int
    leased: int
    quarantined: int
    cached: int


class WorkerPrefixCache(_Answer):
    """Prompt tokens, since the engine's start."""

    queries: int
    hits: int


class WorkerAnswer(_Answer):
    id: str
    role: Literal["prefill", "decode", "both"]
    data_address: str | None
    """Where others fetch its blocks."""
    state: Literal["up", "suspect", "draining", "down"]
    why: str | None
    generation: str
    heard_s_ago: float
    step: int
    engine_silent_s: float
    open_sequences: int
    prefills: int
    running: int
    waiting: int
    blocks: WorkerBlocks
    prefix_cache: WorkerPrefixCache
    step_s: float | None
    """How long its last step took."""
    model: str
    revision: str
    numerics: str
    kv_layout: str
    threads: int
    pid: int


class QueueAnswer(_Answer):
    """Requests of a class that wait at the gateway, as all workers have enough to do."""

    band: Literal["high", "normal", "low"] = Field(alias="class")
    requests: int
    prompt_tokens: int
    longest_s: float
    """How long the first of them has waited."""


class AttainmentAnswer(_Answer):
    """Which share of a class got what it may expect, over a window."""

    band: Literal["high", "normal", "low"] = Field(alias="class")
    slo: Literal["ttft", "tpot"]
    window: str
    limit_s: float
    judged: int
    """Requests, or for `tpot` sequences."""
    attainment: float | None
    """The share that met the limit; null where nothing was judged."""
    burn_rate: float | None
    """The share that missed it against the share that may; null likewise."""


class ServiceLevelsAnswer(_Answer):
    ttft_s: float
    tpot_s: float
    objective: float
    """The share of requests that should get it."""
    attainment: list[AttainmentAnswer]


class ClusterAnswer(_Answer):
    state: Literal["starting", "ready", "draining", "dead"]
    open_sequences: int
    queue: list[QueueAnswer]
    slo: ServiceLevelsAnswer
    workers: list[WorkerAnswer]


class JourneyEvent(_Answer):
    at_s: float
    what: str
    worker: str | None
    detail: dict[str, str | int | float]


class ConsideredAnswer(_Answer):
    worker: str
    chosen: bool
    score: float | None
    terms: dict[str, float | None]
    cached_tokens: int
    queued_tokens: int
    ttft_s: float
    tpot_s: float
    age_s: float | None
    heard_s_ago: float


class DecisionAnswer(_Answer):
    at_s: float
    purpose: Literal["decode", "prefill"]
    policy: str
    rule: str
    candidates: list[ConsideredAnswer]


class JourneyAnswer(_Answer):
    id: str
    prompt_tokens: int
    events: list[JourneyEvent]
    decisions: list[DecisionAnswer]


class JourneysAnswer(_Answer):
    requests: list[JourneyAnswer]


class DrainAnswer(_Answer):
    id: str
    state: Literal["up", "suspect", "draining"]
    open_sequences: int


ERROR_MEANINGS = {
    400: "the request can never be served as it is; `param` names the field, the message its limit",
    401: "no key, or a wrong one",
    403: "the key is not an operator's, or a page of an origin that is not named sent the request",
    404: "no such model",
    408: "the request's timeout passed and it was cancelled, or its body stopped coming",
    413: "the body is larger than the server reads",
    422: "the Idempotency-Key was used with another body",
    429: "the queue, or what the key may use, is full; try again after Retry-After",
    500: "the server failed; its log has the details",
    503: "the model is being loaded, or the server is shutting down; try again after Retry-After",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int, named: bool = False) -> Responses:
    """The OpenAPI entries of error answers; `named` are those of routes that generate, which have an id."""
    found: Responses = {}
    for status in statuses:
        headers = (_RETRY_AFTER if status in (429, 503) else {}) | (_NAMED if named else {})
        found[status] = {"model": ErrorAnswer, "description": ERROR_MEANINGS[status]}
        if headers:
            found[status]["headers"] = headers
    return found


def streamed(answer: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of an answer that is one object, or with `stream: true` a stream of chunks."""
    return {
        "model": answer,
        "headers": _NAMED,
        "description": "The answer; with `stream: true` server-sent events, each `data: ` with a chunk, or "
        "an error object where the answer fails midway, and at last `data: [DONE]`.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string", "description": f"Events whose data is a {chunk.__name__}."}
            }
        },
    }


_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which another attempt can succeed.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}

_NAMED = {
    REQUEST_ID: {
        "description": "The request's id, which GET /cluster/requests/{request_id} takes.",
        "required": True,
        "schema": {"type": "string"},
    }
}

GENERATION_ERRORS = errors(400, 404, 408, 413, 422, 429, 503, named=True)
