"""Puts the HTTP edge together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from loraplex.server.adapter_admin import AdapterAdmin
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.adapter_uploads import AdapterUploads
from loraplex.server.adapter_watch import AdapterWatch
from loraplex.server.edge import Edge
from loraplex.server.engine_client import EngineClient
from loraplex.server.generation_job import JobMaker
from loraplex.server.http_config import HttpConfig
from loraplex.server.http_errors import install_error_handlers
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.load_report import LoadReport
from loraplex.server.metrics import ServerMetrics
from loraplex.server.registry_file import RegistryFile
from loraplex.server.registry_keeper import RegistryKeeper
from loraplex.server.request_middleware import OPEN_PATHS, RequestMiddleware
from loraplex.server.request_records import RequestRecords
from loraplex.server.routes_adapter_aliases import adapter_alias_routes
from loraplex.server.routes_adapters import adapter_routes
from loraplex.server.routes_health import health_routes
from loraplex.server.routes_openai import openai_routes
from loraplex.server.tenants import Tenants
from loraplex.server.tokens import TextTokenizer
from loraplex.server.tracing import RequestSpans, Tracing

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
MakeWatch = Callable[[AdapterAdmin], AdapterWatch]


def create_app(
    engine: EngineClient,
    registry: AdapterRegistry,
    tokenizer: TextTokenizer,
    config: HttpConfig,
    *,
    lifecycle: Lifecycle | None = None,
    lifespan: Lifespan | None = None,
    state: RegistryFile | None = None,
    watch: MakeWatch | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The app. It starts and stops nothing but what its own lifespan does: the engine is its caller's.

    Within its lifespan it tells the engine of the registry, keeps the registry, and follows the watched folder.

    Args:
        lifecycle: shared with whoever drains the server; also at ``app.state.edge.lifecycle``.
        lifespan: run around all that.
        state: where the registry is kept; the app closes it.
        watch: makes what follows the folder of adapters.
        tracing: where spans go; the app closes it.
    """
    lifecycle = lifecycle or Lifecycle()
    tenants = Tenants(config.api_keys, config.tenant_keys)
    metrics = ServerMetrics(
        engine, registry, lifecycle, config.max_adapter_series, tenants.names, compat=config.metrics_compat
    )
    keeper = RegistryKeeper(registry, state)
    admin = AdapterAdmin(engine, registry, SourceRules(config.adapter_roots, config.adapter_sources), keeper)
    uploads = AdapterUploads(admin, engine, registry, state, config.max_adapter_bytes, config.max_uploads)
    admin.on_release.append(uploads.release)
    engine.adapters.on_states.append(keeper.note)
    edge = Edge(
        config=config,
        engine=engine,
        registry=registry,
        admin=admin,
        uploads=uploads,
        tokenizer=tokenizer,
        lifecycle=lifecycle,
        metrics=metrics,
        jobs=JobMaker(config=config, tokenizer=tokenizer),
    )

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(lambda: tracing.close(lifecycle.seconds_left(config.drain_seconds)))
            if lifespan is not None:
                await stack.enter_async_context(lifespan(app))
            await stack.enter_async_context(keeper.running())
            await stack.enter_async_context(uploads.running())
            engine.restore_from(registry.restored)
            if watch is not None:
                await stack.enter_async_context(watch(admin).running())
            yield

    app = FastAPI(
        title="Loraplex",
        version=version("loraplex"),
        lifespan=running,
        redirect_slashes=False,
        telemetry=_telemetry(tracing),
    )
    app.state.edge = edge
    for routes in (openai_routes, health_routes, adapter_routes, adapter_alias_routes):
        app.include_router(routes(edge))
    install_error_handlers(app)
    app.add_middleware(LoadReport, engine=engine)
    app.add_middleware(RequestMiddleware, config=config, tenants=tenants, lifecycle=lifecycle, metrics=metrics)
    spans = None if tracing is None else RequestSpans(tracing.provider)
    app.add_middleware(RequestRecords, spans=spans, access_log=config.access_log)
    return app


def _telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """FastAPI makes the server spans, by HTTP's semantic conventions, and nothing else: metrics and logs are ours."""
    if tracing is None:
        return {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    return {
        "tracer_provider": tracing.provider,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in OPEN_PATHS,
    }
