"""Loads and unloads adapters while the server runs. A name becomes visible only once its adapter was verified."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from loraplex.server.adapter_registry import AdapterRegistry, RegisteredAdapter, check_path
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import ConflictError, InvalidRequestError, ModelNotFoundError
from loraplex.server.lifecycle import check_ready


class AdapterAdmin:
    """Changes the registry. Changes of one name happen one after another; those of different names at once."""

    def __init__(self, engine: EngineClient, registry: AdapterRegistry, roots: Sequence[Path]) -> None:
        self._engine = engine
        self._registry = registry
        self._roots = tuple(root.resolve() for root in roots)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self, name: str, path: str, *, replace: bool, params: tuple[str, str]) -> RegisteredAdapter:
        """Verifies an adapter and registers it.

        Args:
            replace: load even if the name is taken; else only its own path is accepted for it, and nothing happens.
            params: what the request calls the name and the path.

        Raises:
            InvalidRequestError: the name or the path is not acceptable, or the adapter breaks a rule.
            ConflictError: the name stands for another path.
        """
        self._registry.check_name(name, params[0])
        check_path(path, params[1])
        check_ready(self._engine)
        folder = await asyncio.to_thread(self._folder, path, params[1])
        async with self._lock(name):
            known = self._registry.get(name)
            if known is None or replace:
                return await self._register(name, folder)
            self._check_same(known, folder, params[1])
            return known if known.info is not None else await self._read(known)

    async def unload(self, name: str, param: str) -> None:
        """Forgets a name; requests that run under it finish."""
        async with self._lock(name):
            ref = self._registry.remove(name)
            if ref is None:
                raise ModelNotFoundError(f"The adapter '{name[:256]}' does not exist.", param=param)
            await self._engine.unload_adapter(ref)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _register(self, name: str, folder: str) -> RegisteredAdapter:
        ref = self._registry.new_ref(name, folder)
        info = await self._engine.load_adapter(ref)
        known = self._registry.get(name)
        registered = self._registry.register(ref, info)
        if known is not None:
            await self._engine.unload_adapter(known.ref)
        return registered

    async def _read(self, known: RegisteredAdapter) -> RegisteredAdapter:
        """Verifies an adapter that was registered at the start without being read."""
        return self._registry.register(known.ref, await self._engine.load_adapter(known.ref))

    def _check_same(self, known: RegisteredAdapter, folder: str, param: str) -> None:
        if str(Path(known.ref.path).resolve()) != folder:
            raise ConflictError(
                f"The adapter '{known.ref.name}' is loaded from another path; unload it first, or set 'load_inplace'.",
                param=param,
            )

    def _folder(self, path: str, param: str) -> str:
        """An existing folder below one of the roots, without links in its path."""
        try:
            folder = Path(path).resolve()
            inside = not self._roots or any(folder.is_relative_to(root) for root in self._roots)
            exists = inside and folder.is_dir()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequestError(f"'{param}' is not a path: {error}.", param=param) from error
        if not path or not inside:
            raise InvalidRequestError(
                f"'{param}' must name a folder below one of the folders that the server's operator allows.", param=param
            )
        if not exists:
            raise InvalidRequestError(f"'{param}' is no folder on the server: '{path}'.", param=param)
        return str(folder)
