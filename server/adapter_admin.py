"""Changes what is registered while the server runs. A name becomes visible only once its adapter was verified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from structlog.contextvars import bind_contextvars

from loraplex.server.adapter_registry import AdapterRegistry, Origin, RegisteredAdapter
from loraplex.server.adapter_sources import SourceRules, source_kind
from loraplex.server.engine_client import EngineClient, TargetTier
from loraplex.server.errors import ConflictError, LoraplexError, UnavailableError
from loraplex.server.lifecycle import check_ready
from loraplex.server.messages import AdapterInfo, AdapterRef
from loraplex.server.registry_keeper import RegistryKeeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a registration is to have besides its content. None leaves it as it is."""

    pinned: bool | None = None
    tags: tuple[str, ...] | None = None


class AdapterAdmin:
    """Changes the registry. Changes of one name happen one after another; those of different names at once.

    Args:
        rules: what may be registered over HTTP.
        keeper: of what must survive a restart.

    Attributes:
        on_release: called with each registration that is no more, once what is kept for a restart says so, too.
    """

    def __init__(
        self, engine: EngineClient, registry: AdapterRegistry, rules: SourceRules, keeper: RegistryKeeper
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._rules = rules
        self._keeper = keeper
        self.on_release: list[Callable[[RegisteredAdapter], None]] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(
        self, name: str, path: str, *, replace: bool, params: tuple[str, str], wishes: Wishes | None = None
    ) -> RegisteredAdapter:
        """Verifies an adapter and registers it.

        Args:
            replace: load even if the name is taken; else only its own path is accepted for it, and nothing is read.
            params: what the request calls the name and the path.

        Raises:
            InvalidRequestError: the name or the path is not acceptable, or the adapter breaks a rule.
            ConflictError: the name stands for another path.
        """
        wishes = wishes or Wishes()
        self._registry.check_name(name, params[0])
        bind_contextvars(adapter=name)
        path = await self._rules.checked(path, params[1])
        check_ready(self._engine)
        async with self._lock(name):
            known = self._registry.get(name)
            if known is None or replace:
                adapter = await self._register(name, path, "api", wishes)
            else:
                self._check_same(known, path, params[1])
                await self._read(known)
                adapter = await self._grant(name, wishes)
            await self._keeper.saved()
            return adapter

    async def adopt(self, name: str, path: str, *, replace: bool, wishes: Wishes) -> RegisteredAdapter:
        """Verifies and registers a folder of the server's own, made of files that were sent to it.

        Raises:
            LoraplexError: as of ``load``; or the registration, which is in force, could not be saved.
        """
        bind_contextvars(adapter=name)
        check_ready(self._engine)
        async with self._lock(name):
            known = self._registry.get(name)
            if known is not None and not replace and known.ref.path != path:
                raise ConflictError(
                    f"The adapter '{name}' exists with another content; unload it first, or set 'replace'.", param="id"
                )
            if known is not None and known.ref.path == path:
                await self._read(known)
                adapter = await self._grant(name, wishes)
            else:
                adapter = await self._register(name, path, "upload", wishes)
            await self._keeper.saved()
            return adapter

    async def change(self, name: str, wishes: Wishes, path: str | None = None) -> RegisteredAdapter:
        """Moves a name to another path where one is given, in place, and grants wishes."""
        check_ready(self._engine)
        if path is not None:
            path = await self._rules.checked(path, "path")
        async with self._lock(name):
            self._registry.named(name, "adapter_id")
            bind_contextvars(adapter=name)
            if path is None:
                adapter = await self._grant(name, wishes)
            else:
                adapter = await self._register(name, path, "api", wishes)
            await self._keeper.saved()
            return adapter

    async def prefetch(self, name: str, tier: TargetTier) -> RegisteredAdapter:
        """Brings an adapter up to a tier."""
        adapter = self._registry.named(name, "adapter_id")
        bind_contextvars(adapter=name)
        check_ready(self._engine)
        self._note(adapter.ref, await self._engine.prefetch_adapter(adapter.ref, tier))
        return self._registry.get(name) or adapter

    async def unload(self, name: str, param: str) -> RegisteredAdapter:
        """Forgets a name; requests that run under it finish. Returns what it stood for."""
        async with self._lock(name):
            adapter = self._registry.named(name, param)
            bind_contextvars(adapter=name)
            self._registry.remove(name)
            self._keeper.forget(name)
            await self._release(adapter)
            await self._keeper.saved()
            return adapter

    async def follow(self, name: str, path: str) -> None:
        """A folder below the folder of adapters is new, or has another content.

        It is verified before the name moves if the old content was ever read; else it is read on its first use. A name
        that was registered otherwise is left alone.

        Raises:
            LoraplexError: the name or the content is refused; the old registration stays.
        """
        async with self._lock(name):
            known = self._registry.get(name)
            if known is not None and known.origin != "folder":
                return
            self._registry.check_name(name, "adapters")
            if known is not None and known.info is not None:
                await self._register(name, path, "folder", Wishes())
                self._keeper.save_soon()
                return
            await self._exchange_unread(name, path, known)

    async def drop(self, name: str, path: str) -> bool:
        """A folder below the folder of adapters is gone; true if a name went with it."""
        async with self._lock(name):
            known = self._registry.get(name)
            if known is None or known.origin != "folder" or known.ref.path != path:
                return False
            self._registry.remove(name)
            await self._release(known)
            self._keeper.save_soon()
            return True

    async def _exchange_unread(self, name: str, path: str, known: RegisteredAdapter | None) -> None:
        ref = self._registry.new_ref(name, path)
        if known is None:
            self._registry.register(ref, origin="folder")
            return
        self._registry.register(ref, origin="folder", pinned=known.pinned, tags=known.tags)
        await self._unload(known.ref)
        if known.pinned:
            self._note(ref, await self._engine.pin_adapter(ref, True))

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _register(self, name: str, path: str, origin: Origin, wishes: Wishes) -> RegisteredAdapter:
        known = self._registry.get(name)
        pinned = wishes.pinned if wishes.pinned is not None else known is not None and known.pinned
        tags = wishes.tags if wishes.tags is not None else () if known is None else known.tags
        ref = self._registry.new_ref(name, path)
        info = await self._verified(ref, pinned, known)
        registered = self._registry.register(ref, info, pinned=pinned, tags=tags, origin=origin)
        if known is not None:
            await self._release(known)
        return registered

    async def _verified(self, ref: AdapterRef, pinned: bool, known: RegisteredAdapter | None) -> AdapterInfo:
        """Reads an adapter that nobody can ask for yet, and pins it in place of the one before it."""
        moves_pin = pinned and known is not None and known.pinned
        try:
            info = await self._engine.load_adapter(ref)
            if moves_pin and known is not None:
                await self._engine.pin_adapter(known.ref, False)
            if pinned:
                await self._engine.pin_adapter(ref, True)
        except LoraplexError:
            await self._unload(ref)
            if moves_pin and known is not None:
                with contextlib.suppress(LoraplexError):
                    await self._engine.pin_adapter(known.ref, True)
            raise
        return info

    async def _read(self, known: RegisteredAdapter) -> None:
        """Verifies an adapter that was registered without being read."""
        if known.info is None:
            self._note(known.ref, await self._engine.load_adapter(known.ref))

    async def _grant(self, name: str, wishes: Wishes) -> RegisteredAdapter:
        adapter = self._registry.named(name, "adapter_id")
        if wishes.pinned is not None:
            self._note(adapter.ref, await self._engine.pin_adapter(adapter.ref, wishes.pinned))
            self._registry.change(name, pinned=wishes.pinned)
        if wishes.tags is not None:
            self._registry.change(name, tags=wishes.tags)
        return self._registry.get(name) or adapter

    def _note(self, ref: AdapterRef, info: AdapterInfo | None) -> None:
        known = self._registry.get(ref.name)
        if info is not None and known is not None and known.ref == ref:
            self._registry.change(ref.name, info=info)

    async def _release(self, adapter: RegisteredAdapter) -> None:
        await self._unload(adapter.ref)
        for callback in self.on_release:
            self._keeper.once_saved(partial(callback, adapter))

    async def _unload(self, ref: AdapterRef) -> None:
        """Has the engine forget a registration; one that is dead has."""
        with contextlib.suppress(UnavailableError):
            await self._engine.unload_adapter(ref)

    def _check_same(self, known: RegisteredAdapter, path: str, param: str) -> None:
        force = "load_inplace" if param == "lora_path" else "replace"
        is_local = source_kind(known.ref.path) == "file"
        if (str(Path(known.ref.path).resolve()) if is_local else known.ref.path) != path:
            raise ConflictError(
                f"The adapter '{known.ref.name}' is loaded from another path; unload it first, or set '{force}'.",
                param=param,
            )
