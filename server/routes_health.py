"""Health, version and metrics: open to all, cheap, and true while everything else fails."""

from __future__ import annotations

from importlib.metadata import version

import orjson
from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from loraplex.server.edge import Edge
from loraplex.server.lifecycle import check_ready, stopping_error


def health_routes(edge: Edge) -> APIRouter:
    """The routes, over one edge."""
    router = APIRouter(tags=["health"])
    version_body = {"version": version("loraplex")}

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
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(edge.metrics.registry), headers={"content-type": content_type})

    return router


def _ready(edge: Edge) -> Response:
    if edge.lifecycle.leaving:
        raise stopping_error()
    check_ready(edge.engine)
    return _json({"status": "ok"})


def _json(body: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
