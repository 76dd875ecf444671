"""The OpenAPI document: what FastAPI finds out by itself, and what it cannot know.

Added here: the key that is asked for, headers that middleware reads, the models of a stream's events. Taken
out: FastAPI's own form of a validation error, which no client gets to see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from headrace.api.access import OPEN_PATHS
from headrace.api.answers import ChatChunk, ErrorAnswer, TextChunk
from headrace.api.idempotency import HEADER, MAX_KEY_CHARACTERS
from headrace.api.schema import MAX_TIMEOUT_S
from headrace.api.terms import TIMEOUT_HEADER

_SCHEMAS = "#/components/schemas/{model}"
_TIMED = ("/v1/chat/completions", "/v1/completions")


def openapi_of(app: FastAPI, *, keyed: bool) -> Callable[[], dict[str, Any]]:
    """What FastAPI calls for the document. `keyed`: whether the server asks for keys."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = generate()
            _complete(found, keyed)
            app.openapi_schema = found
        return app.openapi_schema

    return document


def _complete(document: dict[str, Any], keyed: bool) -> None:
    schemas = document["components"]["schemas"]
    _, more = models_json_schema(
        [(model, "serialization") for model in (ChatChunk, TextChunk, ErrorAnswer)], ref_template=_SCHEMAS
    )
    schemas.update(more["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete_operation(path, method, operation, keyed)


def _complete_operation(path: str, method: str, operation: dict[str, Any], keyed: bool) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    if method == "post":
        operation.setdefault("parameters", []).append(
            _header(
                HEADER,
                "Requests with the same key and body are answered once, and the answer is repeated.",
                {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS, "pattern": "^[!-~]+$"},
            )
        )
    if path in _TIMED:
        operation["parameters"].append(
            _header(
                TIMEOUT_HEADER,
                "Seconds after which the request is cancelled; see `timeout`.",
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
            )
        )
    if keyed and path not in OPEN_PATHS:
        operation["security"] = [{"key": []}]
        responses["401"] = {
            "description": "no key, or a wrong one",
            "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model="ErrorAnswer")}}},
        }


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
