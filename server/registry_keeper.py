"""Saves the registry while it changes: writes in a thread, one at a time, each with all changes before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import structlog

from loraplex.server.adapter_registry import AdapterRegistry, RegisteredAdapter
from loraplex.server.errors import UnavailableError
from loraplex.server.messages import AdapterState
from loraplex.server.registry_file import RegistryFile, StateFolderError, saved_adapters

_log = structlog.get_logger(__name__)

PAUSE_SECONDS = 1.0
"""Changes that nobody waits for are gathered for so long."""


class RegistryKeeper:
    """Keeps a registry in its file. Without a file nothing is kept, and nothing fails.

    Args:
        file: of the registry; None without a state folder.
    """

    def __init__(self, registry: AdapterRegistry, file: RegistryFile | None) -> None:
        self._registry = registry
        self._file = file
        self._changes = self._written = 0
        self._turn = asyncio.Lock()
        self._later: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def saved(self) -> None:
        """Returns once the registry, as it is now, is on the disk.

        Raises:
            UnavailableError: it cannot be written.
        """
        if self._file is None:
            return
        self._changes += 1
        mine = self._changes
        async with self._turn:
            if self._written >= mine:
                return
            writing, adapters = self._changes, list(self._registry)
            try:
                await asyncio.to_thread(_write, self._file, adapters)
            except StateFolderError as error:
                _log.error("the registry of adapters cannot be saved", reason=error.message)
                raise UnavailableError(
                    f"The change is in force, but would be lost at a restart: {error.message}.", code="not_saved"
                ) from error
            self._written = writing

    def save_soon(self) -> None:
        """Saves in a moment, together with what else changes until then."""
        if self._file is not None and self._later is None:
            self._later = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._begin)

    def note(self, states: Sequence[AdapterState]) -> None:
        """The engine has told of adapters: what they are is kept, too."""
        if saved_adapters(self._registry.note(states)):
            self.save_soon()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the serving: what is still to be saved at the end is saved then, and the folder is let go."""
        try:
            yield
        finally:
            if self._later is not None:
                self._later.cancel()
                with contextlib.suppress(UnavailableError):
                    await self.saved()
            await asyncio.gather(*self._tasks)
            if self._file is not None:
                self._file.close()

    def _begin(self) -> None:
        self._later = None
        task = asyncio.get_running_loop().create_task(self._save_quietly(), name="registry of adapters")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _save_quietly(self) -> None:
        with contextlib.suppress(UnavailableError):
            await self.saved()


def _write(file: RegistryFile, adapters: Sequence[RegisteredAdapter]) -> None:
    file.write(saved_adapters(adapters))
