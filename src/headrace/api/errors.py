"""Errors as OpenAI's clients expect them: one JSON object, whatever went wrong.

In: refusals of the gateway, endings with an error, and everything that FastAPI refuses. Out: a status and
`{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from headrace.api.request_ids import HEADER as REQUEST_ID
from headrace.api.request_ids import request_id_of
from headrace.api.schema import spelled
from headrace.engine import RequestRefused
from headrace.protocol.requests import ErrorCode, RequestError
from headrace.text import TextError

RETRY_AFTER_S = 1

_STATUS = {
    ErrorCode.INVALID: 400,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.OUT_OF_BLOCKS: 400,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.INTERNAL: 500,
}
_TYPE = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODE = {408: "body_incomplete", 413: "body_too_large"}
"""Of what is said by a status alone: FastAPI's refusals, and those of bodies that are being read."""

FAILED = "failed"
"""Set in a request's `scope["state"]` when its answer began with 200 and ended in an error."""

_FIELD_NAMES = {"body", "query", "path", "header"}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int = RETRY_AFTER_S,
    ) -> None:
        """`retry_after_s` is told with a 429 and a 503."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: RequestError) -> ApiError:
        """The answer to a request that the gateway or the engine ended."""
        status = _STATUS[error.code]
        code = None if error.code is ErrorCode.INVALID else error.code.value
        retry_after_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        return cls(status, error.message, param=error.field, code=code, retry_after_s=retry_after_s)

    @classmethod
    def of_status(cls, status: int, message: str) -> ApiError:
        """The answer that a bare HTTP status stands for."""
        return cls(status, message, code=_CODE.get(status))

    def body(self) -> bytes:
        """The error object, serialised."""
        return orjson.dumps(
            {
                "error": {
                    "message": _printable(str(self)),
                    "type": _TYPE.get(
                        self.status, "invalid_request_error" if self.status < 500 else "server_error"
                    ),
                    "param": self.param and _printable(self.param),
                    "code": self.code,
                }
            }
        )

    def response(self, scope: Scope | None = None) -> Response:
        """`scope` is that of a request that may have been one for a model, whose id is told."""
        headers = {} if scope is None else {REQUEST_ID: request_id_of(scope)}
        if self.status in (429, 503):
            headers["Retry-After"] = str(self.retry_after_s)
        elif self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        elif self.code == "deadline_exceeded":
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would begin the same wait again
        elif self.status == 413:
            headers["Connection"] = "close"  # what is left of the body is not read
        return Response(self.body(), self.status, headers, media_type="application/json")


def _printable(text: str) -> str:
    """`text` with unpaired surrogates, which JSON lets in and UTF-8 does not let out, spelled as escapes."""
    return text.encode(errors="backslashreplace").decode()


ANSWERED = (ApiError, RequestRefused, TextError)
"""What routes raise and clients are told."""


def answered(error: Exception) -> ApiError:
    """The answer to one of ANSWERED."""
    match error:
        case RequestRefused():
            return ApiError.of(error.error)
        case TextError():
            return ApiError(400, str(error), param=error.field)
        case ApiError():
            return error
    raise error


def install_error_handlers(app: FastAPI) -> None:
    """Answer everything that a route raises, or that keeps it from being called, with an error object."""

    async def known(request: Request, error: Exception) -> Response:
        return answered(error).response()

    for kind in ANSWERED:
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors(), request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed at {request.url.path}"
        elif error.status_code == 400 and error.__cause__ is not None:
            message = unread(error.__cause__, await request.body())
        response = ApiError.of_status(error.status_code, message).response()
        response.headers.update(error.headers or {})  # such as Allow
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette has the traceback logged by the server; the client learns no more than this.
        return failure().response()


def failure() -> ApiError:
    """The answer where the server itself is at fault."""
    return ApiError(500, "the server failed on this request; its log has the details")


def unread(why: BaseException, body: bytes) -> str:
    """What keeps a body from being read as JSON, where it is not JSON's own grammar."""
    if isinstance(why, UnicodeDecodeError):
        return f"the body is not UTF-8: byte 0x{body[why.start]:02x} at position {why.start}; send UTF-8"
    if isinstance(why, RecursionError):
        return (
            "the body's arrays and objects are nested too deeply: "
            f"the limit is below {sys.getrecursionlimit()} levels"
        )
    digits = sys.get_int_max_str_digits()
    if isinstance(why, ValueError) and (number := re.search(rb"\d{%d}" % (digits + 1), body)):
        return f"the body has an integer of more than {digits} digits at position {number.start()}"
    return f"the body cannot be read: {why}"


def validation_error(found: Sequence[Any], content_type: str) -> ApiError:
    """The first thing that is wrong, with the path of its field as `messages[0].role`."""
    first = found[0]
    if first["type"] == "missing" and tuple(first["loc"]) == ("body",):
        return ApiError(400, "the body is empty; send a JSON object")
    if first["type"] == "model_attributes_type" and len(first["loc"]) == 1:
        if "json" in content_type:
            return ApiError(400, "the body is JSON, but not an object")
        given = f"{content_type[:60]!r}" if content_type else "not given"
        return ApiError(400, f"Content-Type is {given}; send the body with Content-Type: application/json")
    where = [part for part in first["loc"] if part not in _FIELD_NAMES]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # A union's branches are part of pydantic's path, but not of the client's field.
    path = ""
    for part in where:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("list[", "constrained-", "function-")) and part not in ("str", "int"):
            path += f".{part}" if path else part
    message = first["msg"].removeprefix("Value error, ")
    if first["type"].endswith("_type"):
        message += f", got {spelled(first.get('input'))}"
    return ApiError(400, f"{path}: {message}" if path else message, param=path or None)
