"""The shortest way from a body to a route that generates, and from its answer to the socket.

In: POSTs to the paths of given routers. Out: what their routes answer, or the error object that an error
handler of the application would have made, each with the request's id. All other
requests go on to the application, which knows these routes as well, documents them, and says which methods
they take.

FastAPI's own way (matching, exit stacks, dependencies, a layer of senders each for routes and for error
handlers) takes as much of a core as all that the gateway then does for a request, and a part of each event.
"""

from __future__ import annotations

import email.message
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, get_type_hints

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.api.errors import ANSWERED, ApiError, answered, failure, unread, validation_error
from headrace.api.request_ids import header_of, request_id_of

_JSON = "application/json"


class Direct:
    """ASGI middleware, the innermost. Each route takes its body as `body`, validated, and the request."""

    def __init__(
        self, app: ASGIApp, routers: Iterable[APIRouter], refused: Callable[[str, ApiError], None]
    ) -> None:
        """`refused` is told of requests that are answered with an error, by their ids."""
        self._app = app
        self._refused = refused
        self._routes = {
            route.path: _Route(route.endpoint)
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if posted else None
        if route is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await route.answer(Request(scope, receive))
        except ANSWERED as error:
            answer = answered(error)
            self._refused(request_id_of(scope), answer)
            response = answer.response(scope)
        except Exception:
            await failure().response(scope)(scope, receive, send)
            raise  # for the server's log
        else:
            response.raw_headers.append(header_of(scope))
        await response(scope, receive, send)


class _Route:
    def __init__(self, endpoint: Callable[..., Awaitable[Response]]) -> None:
        self._endpoint = endpoint
        self._body: TypeAdapter[Any] = TypeAdapter(get_type_hints(endpoint)["body"])

    async def answer(self, request: Request) -> Response:
        """Raises one of ANSWERED for what is the client's fault, or cannot be served now."""
        content_type = request.headers.get("content-type", "")
        try:
            given = await request.body()
        except ClientDisconnect:
            raise ApiError(400, "the body did not come whole") from None
        except HTTPException as error:  # the body's limits speak so
            raise ApiError.of_status(error.status_code, error.detail) from None
        if not given:
            raise validation_error([{"type": "missing", "loc": ("body",)}], content_type)
        read = _read(given) if _is_json(content_type) else given
        try:
            body = self._body.validate_python(read, from_attributes=True)
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
            raise validation_error(found, content_type) from None
        return await self._endpoint(body=body, request=request)


def _read(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the slower reader takes what this one does not, NaN and UTF-16 for example, and knows why not
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ApiError.of_status(400, unread(error, body)) from None


def _is_json(content_type: str) -> bool:
    if content_type == _JSON:
        return True
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    named = subtype == "json" or subtype.endswith("+json")
    return bool(content_type) and message.get_content_maintype() == "application" and named
