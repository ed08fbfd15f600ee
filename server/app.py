"""Puts the HTTP edge together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version

from fastapi import FastAPI

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.edge import Edge
from loraplex.server.engine_client import EngineClient
from loraplex.server.generation_job import JobMaker
from loraplex.server.http_config import HttpConfig
from loraplex.server.http_errors import install_error_handlers
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.metrics import ServerMetrics
from loraplex.server.request_middleware import RequestMiddleware
from loraplex.server.routes_adapters import adapter_routes
from loraplex.server.routes_health import health_routes
from loraplex.server.routes_openai import openai_routes
from loraplex.server.tokens import TextTokenizer

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    engine: EngineClient,
    registry: AdapterRegistry,
    tokenizer: TextTokenizer,
    config: HttpConfig,
    *,
    lifecycle: Lifecycle | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The app. It starts and stops nothing: the engine is its caller's, or the lifespan's.

    Args:
        lifecycle: shared with whoever drains the server; also at ``app.state.edge.lifecycle``.
        lifespan: run around the serving.
    """
    lifecycle = lifecycle or Lifecycle()
    metrics = ServerMetrics(engine, registry, lifecycle)
    edge = Edge(
        config=config,
        engine=engine,
        registry=registry,
        tokenizer=tokenizer,
        lifecycle=lifecycle,
        metrics=metrics,
        jobs=JobMaker(config=config, tokenizer=tokenizer),
    )
    app = FastAPI(title="Loraplex", version=version("loraplex"), lifespan=lifespan, redirect_slashes=False)
    app.state.edge = edge
    for routes in (openai_routes, adapter_routes, health_routes):
        app.include_router(routes(edge))
    install_error_handlers(app)
    app.add_middleware(RequestMiddleware, config=config, lifecycle=lifecycle, metrics=metrics)
    return app
