"""Saves the registry while it changes: writes in a thread, one at a time, each with all changes before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

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
        self._once_saved: list[tuple[int, Callable[[], None]]] = []
        self._is_closed = False
        self._fault: str | None = None
        self._turn = asyncio.Lock()
        self._later: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def saved(self) -> None:
        """Returns once the registry, as it is now, is on the disk. It gets there even if nobody waits any more.

        Raises:
            UnavailableError: it cannot be written now; that is tried again until it can.
        """
        if self._file is not None:
            self._changes += 1
            await asyncio.shield(self._start(self._save(self._file, self._changes)))

    def once_saved(self, callback: Callable[[], None]) -> None:
        """Calls back when the disk has the registry as it is now, or later; not while the server stops."""
        if self._file is None:
            callback()
        else:
            self._changes += 1
            self._once_saved.append((self._changes, callback))

    def save_soon(self) -> None:
        """Saves in a moment, together with what else changes until then."""
        if self._file is None or self._is_closed:
            return
        self._changes += 1
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._begin)

    def forget(self, name: str) -> None:
        """A name was removed; nothing that the file has of it is to come back."""
        if self._file is not None:
            self._file.forget(name)

    def note(self, states: Sequence[AdapterState]) -> None:
        """The engine has told of adapters: what they are is kept, too."""
        if not self._is_closed and saved_adapters(self._registry.note(states)):
            self.save_soon()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the serving: what is still to be saved at the end is saved then, and the folder is let go."""
        try:
            yield
        finally:
            self._is_closed = True
            self._once_saved.clear()
            if self._later is not None:
                self._later.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._file is not None:
                await self._save_quietly(self._file)
                self._file.close()

    async def _save(self, file: RegistryFile, change: int) -> None:
        """Writes, unless a write that began after this change has brought it to the disk."""
        async with self._turn:
            if self._written >= change:
                return
            writing, adapters = self._changes, list(self._registry)
            try:
                await asyncio.to_thread(_write, file, adapters)
            except StateFolderError as error:
                self._report(error.message)
                self.save_soon()
                raise UnavailableError(
                    f"The change is in force, but would be lost at a restart: {error.message}.", code="not_saved"
                ) from error
            self._written, self._fault = writing, None
        self._call_back()

    def _call_back(self) -> None:
        due = [callback for change, callback in self._once_saved if change <= self._written]
        self._once_saved = [one for one in self._once_saved if one[0] > self._written]
        for callback in due:
            callback()

    def _report(self, reason: str) -> None:
        if reason != self._fault:
            _log.error("the registry of adapters cannot be saved; it is tried again", reason=reason)
        self._fault = reason

    def _start(self, saving: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(saving, name="registry of adapters")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self) -> None:
        self._later = None
        if self._file is not None:
            self._start(self._save_quietly(self._file))

    async def _save_quietly(self, file: RegistryFile) -> None:
        with contextlib.suppress(UnavailableError):
            await self._save(file, self._changes)


def _write(file: RegistryFile, adapters: Sequence[RegisteredAdapter]) -> None:
    file.write(saved_adapters(adapters))
