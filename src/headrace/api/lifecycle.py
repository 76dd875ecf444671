"""Routes about the server itself: is it alive, can it answer now, what does it serve, how is it doing."""

from __future__ import annotations

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from headrace import __version__
from headrace.api.answers import ModelCard, ModelList, Responses, StateAnswer, VersionAnswer, errors
from headrace.api.naming import check_model
from headrace.api.served import Server
from headrace.cluster import GatewayState
from headrace.observe.metrics import CONTENT_TYPE

_STATES: Responses = {
    200: {"model": StateAnswer},
    503: {"model": StateAnswer, "description": "It cannot, for the reason that `status` gives."},
}


def lifecycle_routes(server: Server) -> APIRouter:
    """Routes that need no API key."""
    router = APIRouter()

    def state(ok: bool) -> Response:
        body = orjson.dumps({"status": server.gateway.state})
        return Response(body, 200 if ok else 503, media_type="application/json")

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=_STATES)
    async def health() -> Response:
        """200 while the process and its engine can serve, now or when loading or draining is done."""
        return state(server.gateway.state is not GatewayState.DEAD)

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=_STATES)
    async def ready() -> Response:
        """200 when the model answers now."""
        return state(server.gateway.takes_requests)

    @router.get("/version", responses={200: {"model": VersionAnswer}})
    async def version() -> Response:
        """Headrace's version."""
        return Response(orjson.dumps({"version": __version__}), media_type="application/json")

    @router.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)

    return router


def model_routes(server: Server) -> APIRouter:
    """What is served, as OpenAI lists it."""
    router = APIRouter()

    def card(name: str) -> dict[str, object]:
        shares = server.gateway.versions.of(name)
        infos = [info for model in shares if (info := server.gateway.info_of(model)) is not None]
        return {
            "id": name,
            "object": "model",
            "created": server.model.created,
            "owned_by": "headrace",
            "root": name,
            "parent": None,
            "max_model_len": min((info.max_model_len for info in infos), default=None),
            **({"versions": shares} if name not in server.models else {}),
        }

    @router.get("/v1/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        """The models that are served, and the names of several versions."""
        cards = [card(name) for name in server.names]
        return Response(orjson.dumps({"object": "list", "data": cards}), media_type="application/json")

    @router.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}, **errors(404)})
    async def model(name: str) -> Response:
        """One model."""
        check_model(server, name)
        return Response(orjson.dumps(card(name)), media_type="application/json")

    return router
