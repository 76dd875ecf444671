"""What the cluster is doing, for operators: its workers, the ways of requests, and how to empty a worker.

In: the gateway's registry and journeys. Out: JSON, which `headrace status`, `explain` and `drain` print.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.api.access import check_operator
from headrace.api.answers import ClusterAnswer, DrainAnswer, JourneysAnswer, errors
from headrace.api.errors import ApiError
from headrace.api.origins import check_origin
from headrace.api.served import Server
from headrace.cluster.backlog import Queue
from headrace.cluster.registry import Member
from headrace.observe.service_levels import Attainment

_ID_PREFIXES = ("cmpl-", "chatcmpl-")


def cluster_routes(server: Server) -> APIRouter:
    router = APIRouter()
    gateway = server.gateway

    @router.get("/cluster", responses={200: {"model": ClusterAnswer}})
    async def cluster() -> Response:
        """The gateway's state and every worker that it knows."""
        now = asyncio.get_running_loop().time()
        workers = [_worker(member, now) for member in gateway.registry]
        return _json(
            {
                "state": gateway.state,
                "open_sequences": gateway.open_samples,
                "queue": [_queue(one) for one in gateway.backlog.queues()],
                "slo": {
                    "ttft_s": server.slo.ttft_s,
                    "tpot_s": server.slo.tpot_s,
                    "objective": server.slo.objective,
                    "attainment": [_attainment(one) for one in server.metrics.attainment()],
                },
                "workers": workers,
            }
        )

    @router.get(
        "/cluster/requests/{request_id}", responses={200: {"model": JourneysAnswer}, **errors(403, 404)}
    )
    async def explain(request: Request, request_id: str) -> Response:
        """What happened to one of the last requests, refused ones too, by the `X-Request-Id` of its answer or
        the `id` in it; one way for each prompt."""
        check_operator(request)
        name = request_id
        for prefix in _ID_PREFIXES:
            name = name.removeprefix(prefix)
        found = gateway.journeys.of(name)
        if not found:
            raise ApiError(
                404,
                f"nothing is known of a request {request_id!r}; the last {gateway.journeys.most} are kept, "
                "and as many that were refused",
            )
        return _json({"requests": [journey.as_json() for journey in found]})

    @router.post(
        "/cluster/workers/{worker_id}/drain",
        responses={200: {"model": DrainAnswer}, **errors(400, 403, 404, 408, 413, 422)},
    )
    async def drain(request: Request, worker_id: str) -> Response:
        """Give a worker nothing new, and have it leave when what it has is over."""
        check_origin(request, server.options.cors_origins)
        check_operator(request)
        member = gateway.registry.get(worker_id)
        if member is None or not member.is_live:
            known = ", ".join(member.worker_id for member in gateway.registry.live()) or "none"
            raise ApiError(404, f"there is no worker {worker_id!r}; there are: {known}")
        gateway.drain_worker(member)
        return _json({"id": worker_id, "state": member.state, "open_sequences": member.open_samples})

    return router


def refusals(server: Server) -> Callable[[str, ApiError], None]:
    """Keeps that a request was refused before it was one for the gateway, as by what its key may use."""

    def refused(request_id: str, error: ApiError) -> None:
        if error.status in (429, 503):  # all others say what to change in the request
            now = asyncio.get_running_loop().time()
            server.gateway.journeys.refused(
                request_id, now, why=str(error), retry_after_s=error.retry_after_s
            )

    return refused


def _queue(one: Queue) -> dict[str, Any]:
    return {
        "class": one.band,
        "requests": one.requests,
        "prompt_tokens": one.tokens,
        "longest_s": round(one.longest_s, 3),
    }


def _attainment(one: Attainment) -> dict[str, Any]:
    return {
        "class": one.band,
        "slo": one.slo,
        "window": one.window,
        "limit_s": one.limit_s,
        "judged": one.judged,
        "attainment": one.ratio,
        "burn_rate": one.burn_rate,
    }


def _worker(member: Member, now: float) -> dict[str, Any]:
    info, stats = member.info, member.stats
    live = member.is_live
    return {
        "id": member.worker_id,
        "role": info.role,
        "data_address": info.data_address or None,
        "state": member.state,
        "why": member.why_down or None,
        "generation": f"{info.generation:016x}",
        "heard_s_ago": round(now - member.heard_s, 3),
        "step": max(member.step, stats.step if stats is not None else 0),
        "engine_silent_s": round(member.engine_silent_s, 3),
        "open_sequences": member.open_samples,
        "prefills": member.exports,
        "running": stats.running if stats is not None and live else 0,
        "waiting": stats.waiting if stats is not None and live else 0,
        "blocks": {
            "total": info.engine.num_blocks,
            "held": stats.blocks_held if stats is not None and live else 0,
            "leased": stats.blocks_leased if stats is not None and live else 0,
            "quarantined": stats.blocks_quarantined if stats is not None and live else 0,
            "cached": stats.blocks_cached if stats is not None and live else 0,
        },
        "prefix_cache": {
            "queries": stats.prefix_queries if stats is not None else 0,
            "hits": stats.prefix_hits if stats is not None else 0,
        },
        "step_s": stats.step_s if stats is not None and stats.rows and live else None,
        "model": info.engine.model,
        "revision": info.engine.revision,
        "numerics": info.engine.numerics,
        "kv_layout": info.engine.kv_layout,
        "threads": info.engine.threads,
        "pid": info.engine.pid,
    }


def _json(answer: dict[str, Any]) -> Response:
    return Response(orjson.dumps(answer, default=msgspec.to_builtins), media_type="application/json")
