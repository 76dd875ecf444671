"""The application: all routes with one form of error, and the doors that a request passes on its way to them.

From the outside in: origins (CORS), the body's limits, the key, idempotency, the short way to routes
that generate. Each is plain ASGI and leaves the messages of a running stream alone. FastAPI and its layers
lie behind them all, so that a stream's events pass none of those.
"""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.types import ASGIApp

from headrace import __version__
from headrace.api.access import KeyRequired
from headrace.api.bodies import BodyLimit
from headrace.api.chat import chat_routes
from headrace.api.cluster import cluster_routes, refusals
from headrace.api.completions import completion_routes
from headrace.api.direct import Direct
from headrace.api.document import openapi_of
from headrace.api.errors import install_error_handlers
from headrace.api.idempotency import Idempotency
from headrace.api.lifecycle import lifecycle_routes, model_routes
from headrace.api.origins import NamedOrigins
from headrace.api.quota import KeyRing
from headrace.api.schema import MAX_DETOKENIZED
from headrace.api.served import Server
from headrace.api.tokenize import tokenize_routes

OTHER_VALUES = 65_536
"""In a body, beside its longest list or text."""


def create_app(server: Server) -> ASGIApp:
    """Put routes and doors together, as the server's options ask."""
    options = server.options
    app = FastAPI(
        title="Headrace",
        version=__version__,
        docs_url="/docs",
        redoc_url=None,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # else it looks for them on each request
    )
    install_error_handlers(app)
    generating = [chat_routes(server), completion_routes(server)]
    others = [routes(server) for routes in (lifecycle_routes, model_routes, tokenize_routes, cluster_routes)]
    for router in (*generating, *others):
        app.include_router(router)
    app.openapi = openapi_of(app, keyed=bool(options.keys))  # type: ignore[method-assign]
    doors: ASGIApp = Idempotency(Direct(app, generating, refusals(server)))
    if options.keys:
        doors = KeyRequired(doors, KeyRing(options.keys, time.monotonic))
    doors = BodyLimit(
        doors,
        max_bytes=options.max_body_bytes,
        # The longest texts may consist of them, the longest lists of ids do.
        max_values=max(options.max_prompt_characters, MAX_DETOKENIZED) + OTHER_VALUES,
    )
    return NamedOrigins(doors, options.cors_origins) if options.cors_origins else doors
