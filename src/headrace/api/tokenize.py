"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, without generating anything."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.api.answers import DetokenizeAnswer, TokenizeAnswer, errors
from headrace.api.errors import ApiError
from headrace.api.naming import model_of_text
from headrace.api.prompts import context_length, conversation_tokens, encoded
from headrace.api.schema import DetokenizeRequest, TokenizeRequest
from headrace.api.served import Server
from headrace.api.terms import admit_small


def tokenize_routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/tokenize", responses={200: {"model": TokenizeAnswer}, **errors(400, 404, 408, 413, 422, 429)}
    )
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a prompt, or of a conversation as the model is given it."""
        model = model_of_text(server, body.model, chat=body.messages is not None)
        admit_small(request)
        if body.messages is not None:
            tokens = await conversation_tokens(
                server,
                model,
                body.messages,
                body.template_arguments,
                add_special_tokens=bool(body.add_special_tokens),
            )
        else:
            special = body.add_special_tokens is not False
            tokens = await encoded(server, model, body.prompt or "", "prompt", add_special_tokens=special)
        spelled = None
        if body.return_token_strs:
            spelled = [model.tokenizer.id_to_token(token) or "" for token in tokens]
        return _json(
            {
                "count": len(tokens),
                "max_model_len": context_length(server, model),
                "tokens": tokens,
                "token_strs": spelled,
            }
        )

    @router.post(
        "/detokenize", responses={200: {"model": DetokenizeAnswer}, **errors(400, 404, 408, 413, 422, 429)}
    )
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of token ids, control tokens included."""
        model = model_of_text(server, body.model)
        admit_small(request)
        size = model.tokenizer.vocab_size
        for at, token in enumerate(body.tokens):
            if not 0 <= token < size:
                raise ApiError(
                    400, f"tokens[{at}] is {token}, outside the vocabulary of {size}", param=f"tokens[{at}]"
                )
        return _json({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return router


def _json(answer: dict[str, Any]) -> Response:
    return Response(orjson.dumps(answer), media_type="application/json")
