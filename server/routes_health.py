"""Health, version and metrics: open to all, cheap, and true while everything else fails."""

from __future__ import annotations

from importlib.metadata import version

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex.server.edge import Edge
from loraplex.server.lifecycle import check_ready, stopping_error
from loraplex.server.metrics_page import MetricsPage


def health_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["health"])
    version_body = {"version": version("loraplex")}
    page = MetricsPage(edge.metrics.registry, edge.metrics.collect, edge.config.metrics_share)

    @router.get("/health")
    async def health() -> Response:
        return _ready(edge)

    @router.get("/readyz")
    async def readyz() -> Response:
        return _ready(edge)

    @router.get("/ping")
    async def ping() -> Response:
        return _ready(edge)

    @router.get("/livez")
    async def livez() -> Response:
        return _json({"status": "ok"})

    @router.get("/version")
    async def get_version() -> Response:
        return _json(version_body)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", ""), request.headers.get("accept-encoding", "")
        body, headers = page.answer(*accept)
        return Response(body, headers=headers)

    return router


def _ready(edge: Edge) -> Response:
    if edge.lifecycle.leaving:
        raise stopping_error()
    check_ready(edge.engine)
    return _json({"status": "ok"})


def _json(body: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
