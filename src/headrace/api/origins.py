"""Lets pages of named origins call (CORS), whichever headers their client library sends.

In: every HTTP request. Out: the same; to a browser's question beforehand (a preflight) its answer. Origins
are what is restricted: a header that a page of a named origin sends tells the server nothing that it trusts.

A browser sends some requests without asking beforehand, for pages of any origin. What must not be done for
those is guarded by `check_origin`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from headrace.api.errors import ApiError
from headrace.api.request_ids import HEADER as REQUEST_ID

METHODS = ("GET", "POST")
EXPOSED_HEADERS = (
    *("Retry-After", "Idempotent-Replayed", "X-Should-Retry", "X-Headrace-Degraded", "X-Headrace-Model"),
    REQUEST_ID,
)
"""What pages may read of an answer beside its body."""


class NamedOrigins(CORSMiddleware):
    """ASGI middleware; `*` among `origins` lets all in."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # answered with the very headers that were asked for
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """As the base class decides; a refusal is an error object as all are."""
        decided = super().preflight_response(request_headers)
        if decided.status_code < 400:
            return decided
        if not self.is_allowed_origin(request_headers["origin"]):
            why = f"pages of {request_headers['origin'][:100]!r} may not call; --cors-origin names who may"
        else:
            why = f"pages may call with {' and '.join(METHODS)}, and from no public into a private network"
        refused = ApiError(400, why).response()
        own = {"content-type", "content-length"}
        headers = {name: value for name, value in decided.headers.items() if name not in own}
        MutableHeaders(raw=refused.raw_headers).update(headers)
        return refused


def check_origin(request: Request, named: Collection[str]) -> None:
    """Raise ApiError 403 for a request that a browser sends for a page that is neither named nor our own."""
    origin = request.headers.get("origin")
    if origin is None:
        if request.headers.get("sec-fetch-site") != "cross-site":
            return
        origin = "another origin"
    elif "*" in named or origin in named or _is_own(origin, request):
        return
    raise ApiError(
        403,
        f"pages of {origin[:100]!r} may not do this; --cors-origin names who may",
        code="origin_not_allowed",
    )


def _is_own(origin: str, request: Request) -> bool:
    """Whether it is this server by its address. A name may be anybody's, who lets it lead here."""
    host = request.url.hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            return False
    return urlsplit(origin)[:2] == (request.url.scheme, request.url.netloc)
