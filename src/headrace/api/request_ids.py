"""The id of an HTTP request that generates: what its answer names, well or not, and `headrace explain` takes.

OpenAI's clients show the header as `_request_id` of an answer and `request_id` of an error. The `id` in an
answer, and in each chunk of a stream, is the same with a prefix.
"""

from __future__ import annotations

import secrets

from starlette.types import Scope

HEADER = "X-Request-Id"

_NAME = HEADER.lower().encode()
_KEY = "request_id"


def new_request_id() -> str:
    return secrets.token_hex(16)


def request_id_of(scope: Scope) -> str:
    """The id of the request, from the first asking on always the same."""
    found: str = scope.setdefault("state", {}).setdefault(_KEY, "") or new_request_id()
    scope["state"][_KEY] = found
    return found


def header_of(scope: Scope) -> tuple[bytes, bytes]:
    """It as ASGI has it."""
    return _NAME, request_id_of(scope).encode()
