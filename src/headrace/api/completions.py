"""POST /v1/completions: prompts of text or token ids, continued."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.api.answers import GENERATION_ERRORS, TextAnswer, TextChunk, streamed
from headrace.api.generation import (
    ClientLeftError,
    Generation,
    Prepared,
    Watcher,
    generation_of,
    sampling_of,
)
from headrace.api.logprobs import completion_logprobs, prompt_logprobs
from headrace.api.naming import check_model
from headrace.api.prompts import prompt_tokens
from headrace.api.sample import Piece, Sample
from headrace.api.schema import CompletionRequest
from headrace.api.served import ServedModel, Server
from headrace.api.streaming import CLIENT_LEFT, ChunkTemplate, ChunkWriter, event, stream_response
from headrace.api.terms import Terms
from headrace.protocol.requests import TokenLogprobs
from headrace.text import IncrementalDetokenizer

DEFAULT_MAX_TOKENS = 16


def completion_routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses={200: streamed(TextAnswer, TextChunk), **GENERATION_ERRORS})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        check_model(server, body.model)
        terms = Terms.of(server, request, body.timeout)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prompt_only = body.echo and max_tokens == 0
        of_prompt = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            of_prompt = max(of_prompt or 0, body.logprobs)

        async def prepared(model: ServedModel) -> Prepared:
            sampling = sampling_of(
                server,
                model,
                body,
                # The engine samples at least one token; of a request for none, only the prompt is told.
                max_tokens=1 if prompt_only else max_tokens,
                logprobs=body.logprobs,
                prompt_logprobs=of_prompt,
            )
            special = body.add_special_tokens
            prompts = await prompt_tokens(server, model, body.prompt, add_special_tokens=special)
            return Prepared(prompts, sampling)

        generation = await generation_of(server, body, terms, prepared)
        choices = _Choices(body, generation, prompt_only)
        if body.stream:
            writer = _CompletionChunks(generation, body, choices)
            return await stream_response(request.receive, generation, writer, body.include_usage)
        return await _whole(request, generation, choices)

    return router


class _Choices:
    """What both answers, whole and streamed, do to a piece: echo the prompt, count offsets."""

    def __init__(self, body: CompletionRequest, generation: Generation, prompt_only: bool) -> None:
        self._tokenizer = generation.model.tokenizer
        self._echo = body.echo
        self._with_logprobs = body.logprobs is not None
        self._alternatives = body.logprobs or 0
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        self._wants_token_ids = body.return_token_ids
        self.prompt_only = prompt_only
        self._generation = generation
        self._n = len(generation.samples) // len(generation.prompts)
        self._offsets = [0] * len(generation.samples)
        self._begun = [False] * len(generation.samples)

    def begun(self, choice: int) -> bool:
        return self._begun[choice]

    def add(self, choice: int, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """The text and logprobs that a piece adds to a choice, the echoed prompt before its first."""
        text, entries, tokens, texts = ("", [], [], []) if self.prompt_only else _parts(piece)
        if self._echo and not self._begun[choice]:
            number = choice // self._n
            prompt_text, prompt_entries, prompt_texts = self._prompt(number)
            text, entries, texts = prompt_text + text, prompt_entries + entries, prompt_texts + texts
            tokens = self._generation.prompts[number] + tokens
        self._begun[choice] = True
        offset = self._offsets[choice]
        self._offsets[choice] += len(text)
        if not self._with_logprobs:
            return text, None
        return text, completion_logprobs(self._tokenizer, entries, tokens, texts, offset)

    def finish_reason(self, sample: Sample) -> str | None:
        return "length" if self.prompt_only and sample.finish_reason is not None else sample.finish_reason

    def extra(self, choice: int) -> dict[str, Any]:
        """What vLLM's clients may ask of a prompt: its log-probabilities, on its first choice, and its
        ids."""
        number, found = choice // self._n, {}
        of_prompt = self._generation.prompt_logprobs[number]
        if self._wants_prompt_logprobs and of_prompt is not None and choice % self._n == 0:
            found["prompt_logprobs"] = prompt_logprobs(self._tokenizer, of_prompt)
        if self._wants_token_ids:
            found["prompt_token_ids"] = self._generation.prompts[number]
        return found

    def token_ids(self, piece: Piece) -> dict[str, list[int]]:
        """The ids of a piece's tokens, where they were asked for."""
        if not self._wants_token_ids:
            return {}
        return {"token_ids": [] if self.prompt_only else piece.token_ids}

    def usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        if self.prompt_only:
            usage.update(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    def _prompt(self, number: int) -> tuple[str, list[TokenLogprobs | None], list[str]]:
        detokenizer = IncrementalDetokenizer(self._tokenizer)
        texts = [detokenizer.push(token) for token in self._generation.prompts[number]]
        texts[-1] += detokenizer.flush()
        of_prompt = self._generation.prompt_logprobs[number] or []
        entries: list[TokenLogprobs | None] = [None]
        for entry in of_prompt:
            top = entry.top[: self._alternatives]
            entries.append(TokenLogprobs(entry.token, entry.logprob, entry.rank, top))
        return "".join(texts), entries, texts


def _parts(piece: Piece) -> tuple[str, list[TokenLogprobs | None], list[int], list[str]]:
    return piece.text, [*piece.logprobs], [entry.token for entry in piece.logprobs], piece.token_texts


async def _whole(request: Request, generation: Generation, choices: _Choices) -> Response:
    pieces = [Piece("") for _ in generation.samples]
    try:
        with generation, Watcher(request.receive, generation):
            async for added in generation:
                for choice, piece in added:
                    whole = pieces[choice]
                    whole.text += piece.text
                    whole.logprobs += piece.logprobs
                    whole.token_texts += piece.token_texts
                    whole.token_ids += piece.token_ids
    except ClientLeftError:
        return Response(status_code=CLIENT_LEFT)
    found = []
    for choice, (sample, piece) in enumerate(zip(generation.samples, pieces, strict=True)):
        text, logprobs = choices.add(choice, piece)
        found.append(
            {
                "index": choice,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": choices.finish_reason(sample),
                "stop_reason": sample.stop_reason,
                **choices.extra(choice),
                **choices.token_ids(piece),
            }
        )
    answer = {
        "id": f"cmpl-{generation.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": generation.model.name,
        "choices": found,
        "usage": choices.usage(),
    }
    return Response(orjson.dumps(answer), headers=generation.headers, media_type="application/json")


class _CompletionChunks(ChunkWriter):
    def __init__(self, generation: Generation, body: CompletionRequest, choices: _Choices) -> None:
        self._choices = choices
        self._frame = {
            "id": f"cmpl-{generation.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generation.model.name,
        }
        self._plain = not body.echo and body.logprobs is None and not body.return_token_ids
        self._usage = {"usage": None} if body.include_usage else {}
        self._templates = [
            ChunkTemplate(lambda text, choice=choice: self._chunk(choice, text))  # type: ignore[misc]
            for choice in range(len(generation.samples))
        ]

    def begin(self, generation: Generation) -> bytes:
        return b""

    def piece(self, choice: int, piece: Piece, sample: Sample) -> bytes:
        if self._plain and self._choices.begun(choice) and sample.finish_reason is None:
            return self._templates[choice].fill(piece.text) if piece.text else b""
        first = not self._choices.begun(choice)
        text, logprobs = self._choices.add(choice, piece)
        if not (text or piece.logprobs or piece.token_ids) and sample.finish_reason is None and not first:
            return b""
        chunk = self._chunk(choice, text)
        chunk["choices"][0]["logprobs"] = logprobs
        chunk["choices"][0].update(self._choices.token_ids(piece))
        if first:
            chunk["choices"][0].update(self._choices.extra(choice))
        if sample.finish_reason is not None:
            chunk["choices"][0]["finish_reason"] = self._choices.finish_reason(sample)
            chunk["choices"][0]["stop_reason"] = sample.stop_reason
        return event(chunk)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event({**self._frame, "choices": [], "usage": self._choices.usage()})

    def _chunk(self, choice: int, text: str) -> dict[str, Any]:
        choices = [{"index": choice, "text": text, "logprobs": None, "finish_reason": None}]
        return {**self._frame, "choices": choices, **self._usage}
