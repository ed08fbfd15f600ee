"""An adapter as the API shows it, and which adapters a list asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.server.adapter_registry import RegisteredAdapter
from loraplex.server.adapter_sources import source_kind
from loraplex.server.adapter_view import Phase, phase_of
from loraplex.server.engine_client import EngineClient
from loraplex.server.messages import AdapterState, AdapterTier, ErrorInfo

KindName = Literal["lora", "dora", "alora", "mixlora", "mola", "loramoe", "meteora", "tokenwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFilter:
    """Which adapters a list asks for; None asks for nothing. ``kind`` finds those that were read at some time."""

    state: Phase | None = None
    tier: AdapterTier | None = None
    kind: KindName | None = None
    tag: str | None = None
    pinned: bool | None = None

    def accept(self, engine: EngineClient) -> Callable[[RegisteredAdapter], bool] | None:
        """Tells which adapters are asked for; None if all are."""
        if self == AdapterFilter():
            return None
        return lambda adapter: self._fits(adapter) and self._fits_state(adapter, state_of(engine, adapter))

    def _fits(self, adapter: RegisteredAdapter) -> bool:
        info = adapter.info
        return (
            (self.pinned is None or adapter.pinned == self.pinned)
            and (self.tag is None or self.tag in adapter.tags)
            and (self.kind is None or (info is not None and info.kind == self.kind))
        )

    def _fits_state(self, adapter: RegisteredAdapter, now: AdapterState) -> bool:
        fits_tier = self.tier is None or now.tier == self.tier
        return fits_tier and (self.state is None or phase_of(now, known=adapter.info is not None) == self.state)


def state_of(engine: EngineClient, adapter: RegisteredAdapter) -> AdapterState:
    """Where an adapter is now; on disk while there is no engine."""
    if engine.state != "ready":
        return AdapterState(path=adapter.ref.path, revision=adapter.ref.revision)
    return engine.adapters.state(adapter.ref)


def adapter_card(engine: EngineClient, parent: str, adapter: RegisteredAdapter) -> dict[str, Any]:
    """An adapter as the API shows it. What is not known before the first use is null."""
    ref, info, now = adapter.ref, adapter.info, state_of(engine, adapter)
    return {
        "id": ref.name,
        "object": "adapter",
        "name": ref.name,
        "path": ref.path,
        "source": "upload" if adapter.origin == "upload" else source_kind(ref.path),
        "parent": parent,
        "created": adapter.created,
        "revision": ref.revision,
        "state": phase_of(now, known=info is not None),
        "error": None if now.error is None else _error(now.error),
        "tier": now.tier,
        "identity": adapter.identity,
        "kind": info and info.kind,
        "rank": info and info.rank,
        "num_experts": info and info.num_experts,
        "targets": info and info.targets,
        "bytes": info and info.bytes,
        "pages": info and info.pages,
        "pinned": adapter.pinned,
        "tags": adapter.tags,
        "running": engine.running(ref),
        "warnings": info.warnings if info else [],
    }


def _error(error: ErrorInfo) -> dict[str, Any]:
    return {"message": error.message, "param": error.param, "code": error.code}
