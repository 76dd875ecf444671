"""The application: all routes, behind one key where one is asked for, with one form of error."""

from __future__ import annotations

import hmac

from fastapi import Depends, FastAPI, Request

from headrace import __version__
from headrace.api.chat import chat_routes
from headrace.api.completions import completion_routes
from headrace.api.errors import ApiError, install_error_handlers
from headrace.api.lifecycle import lifecycle_routes, model_routes
from headrace.api.served import Server


def create_app(server: Server) -> FastAPI:
    """Put the routes together. Under /v1 they ask for the key, if `server` has one."""
    app = FastAPI(title="Headrace", version=__version__, docs_url="/docs", redoc_url=None)
    install_error_handlers(app)
    app.include_router(lifecycle_routes(server))
    keyed = [] if server.api_key is None else [Depends(_KeyRequired(server.api_key))]
    for router in (model_routes(server), chat_routes(server), completion_routes(server)):
        app.include_router(router, dependencies=keyed)
    return app


class _KeyRequired:
    """Refuses requests without the key."""

    def __init__(self, key: str) -> None:
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
        if not hmac.compare_digest(given, self._expected):
            raise ApiError(
                401,
                "the API key is wrong"
                if given
                else "no API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
