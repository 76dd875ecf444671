"""Lets in who has a key: the outer door of everything but the routes that only tell how the server is.

In: every HTTP request. Out: the same with its caller in `scope["state"]["caller"]`, or a 401. What the caller
may have is asked later, when it is known what the request wants.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.api.errors import ApiError
from headrace.api.quota import Caller, KeyRing

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"})
"""Asked for by probes and people, without a key."""

CALLER = "caller"


class KeyRequired:
    """ASGI middleware that asks for a key of `keys`."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            try:
                scope.setdefault("state", {})[CALLER] = self._keys.caller_of(given)
            except ApiError as error:
                await error.response(scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def caller_of(scope: Scope) -> Caller | None:
    """Who sent a request that was let in; None where everybody is."""
    caller: Caller | None = scope.get("state", {}).get(CALLER)
    return caller


def check_operator(request: Request) -> None:
    """Raises ApiError 403 where the caller's key is no operator's; without keys everybody is one."""
    caller = caller_of(request.scope)
    if caller is not None and not caller.operator:
        raise ApiError(
            403,
            f"the key {caller.name!r} is no operator's; use one of --api-key, or one with `operator = true`",
            code="not_operator",
        )
