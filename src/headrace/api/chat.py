"""POST /v1/chat/completions: a conversation, continued by the assistant."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.api.answers import GENERATION_ERRORS, ChatAnswer, ChatChunk, streamed
from headrace.api.generation import (
    ClientLeftError,
    Generation,
    Prepared,
    Watcher,
    generation_of,
    sampling_of,
)
from headrace.api.logprobs import chat_logprobs, prompt_logprobs
from headrace.api.naming import check_model
from headrace.api.prompts import context_length, conversation_tokens
from headrace.api.sample import Piece, Sample
from headrace.api.schema import ChatCompletionRequest
from headrace.api.served import ServedModel, Server
from headrace.api.streaming import CLIENT_LEFT, ChunkTemplate, ChunkWriter, event, stream_response
from headrace.api.terms import Terms
from headrace.engine import RequestRefused
from headrace.protocol.requests import TokenLogprobs


def chat_routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions", responses={200: streamed(ChatAnswer, ChatChunk), **GENERATION_ERRORS}
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Continue a conversation."""
        check_model(server, body.model)
        terms = Terms.of(server, request, body.timeout)
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens

        async def prepared(model: ServedModel) -> Prepared:
            prompt = await conversation_tokens(server, model, body.messages, body.template_arguments)
            left = max(1, (context_length(server, model) or 1) - len(prompt))
            sampling = sampling_of(
                server,
                model,
                body,
                max_tokens=left if asked is None else asked,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                prompt_logprobs=body.prompt_logprobs,
            )
            return Prepared([prompt], sampling)

        try:
            generation = await generation_of(server, body, terms, prepared, chat=True)
        except RequestRefused as refusal:
            error = refusal.error
            field = "messages" if error.field == "prompt" else error.field  # where the client finds it
            again_s = error.retry_after_s
            raise RequestRefused(error.code, error.message, field, retry_after_s=again_s) from None
        if body.stream:
            writer = _ChatChunks(generation, body)
            return await stream_response(request.receive, generation, writer, body.include_usage)
        return await _whole(body, request, generation)

    return router


async def _whole(body: ChatCompletionRequest, request: Request, generation: Generation) -> Response:
    texts = [""] * len(generation.samples)
    logprobs: list[list[TokenLogprobs]] = [[] for _ in generation.samples]
    token_ids: list[list[int]] = [[] for _ in generation.samples]
    try:
        with generation, Watcher(request.receive, generation):
            async for pieces in generation:
                for choice, piece in pieces:
                    texts[choice] += piece.text
                    logprobs[choice] += piece.logprobs
                    token_ids[choice] += piece.token_ids
    except ClientLeftError:
        return Response(status_code=CLIENT_LEFT)
    tokenizer = generation.model.tokenizer
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{generation.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": generation.model.name,
        "choices": [
            {
                "index": choice,
                "message": {"role": "assistant", "content": texts[choice], "refusal": None},
                "logprobs": chat_logprobs(tokenizer, logprobs[choice]) if body.logprobs else None,
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
                **({"token_ids": token_ids[choice]} if body.return_token_ids else {}),
            }
            for choice, sample in enumerate(generation.samples)
        ],
        "usage": generation.usage(),
    }
    if (of_prompt := generation.prompt_logprobs[0]) is not None:
        answer["prompt_logprobs"] = prompt_logprobs(tokenizer, of_prompt)
    if body.return_token_ids:
        answer["prompt_token_ids"] = generation.prompts[0]
    return Response(orjson.dumps(answer), headers=generation.headers, media_type="application/json")


class _ChatChunks(ChunkWriter):
    def __init__(self, generation: Generation, body: ChatCompletionRequest) -> None:
        self._tokenizer = generation.model.tokenizer
        self._logprobs = body.logprobs
        self._token_ids = body.return_token_ids
        self._frame = {
            "id": f"chatcmpl-{generation.id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": generation.model.name,
        }
        # OpenAI announces the last chunk by a null in all others.
        self._usage = {"usage": None} if body.include_usage else {}
        self._templates = [
            ChunkTemplate(lambda text, choice=choice: self._chunk(choice, {"content": text}))  # type: ignore[misc]
            for choice in range(len(generation.samples))
        ]

    def begin(self, generation: Generation) -> bytes:
        roles = [
            self._chunk(choice, {"role": "assistant", "content": ""})
            for choice in range(len(generation.samples))
        ]
        if (of_prompt := generation.prompt_logprobs[0]) is not None:
            roles[0]["prompt_logprobs"] = prompt_logprobs(self._tokenizer, of_prompt)
        if self._token_ids:
            roles[0]["prompt_token_ids"] = generation.prompts[0]
        return b"".join(map(event, roles))

    def piece(self, choice: int, piece: Piece, sample: Sample) -> bytes:
        if sample.finish_reason is None and not piece.logprobs and not piece.token_ids:
            return self._templates[choice].fill(piece.text) if piece.text else b""
        delta = {"content": piece.text} if piece.text or piece.logprobs else {}
        chunk = self._chunk(choice, delta)
        if self._logprobs:
            chunk["choices"][0]["logprobs"] = chat_logprobs(self._tokenizer, piece.logprobs)
        if self._token_ids:
            chunk["choices"][0]["token_ids"] = piece.token_ids
        if sample.finish_reason is not None:
            chunk["choices"][0]["finish_reason"] = sample.finish_reason
            chunk["choices"][0]["stop_reason"] = sample.stop_reason
        return event(chunk)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event({**self._frame, "choices": [], "usage": usage})

    def _chunk(self, choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}]
        return {**self._frame, "choices": choices, **self._usage}
