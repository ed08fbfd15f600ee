"""Follows a folder of adapters while serving: what is new, changed or gone there is so in the registry soon after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from loraplex.server.adapter_admin import AdapterAdmin
from loraplex.server.errors import LoraplexError
from loraplex.server.folder_scan import Changes, Found, Scan, SettledChanges, scan_folder

_log = structlog.get_logger(__name__)


class AdapterWatch:
    """Looks at a folder over and over.

    Args:
        root: the folder of adapters.
        seconds: between two looks.
        registered: what was found there when the registry was filled.

    Attributes:
        scans: looks that are over, and acted upon.
    """

    def __init__(self, admin: AdapterAdmin, root: Path, seconds: float, registered: Scan) -> None:
        self._admin = admin
        self._root = root
        self._seconds = seconds
        self._changes = SettledChanges(dict(registered))
        self._fault: str | None = None
        self.scans = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the serving."""
        task = asyncio.create_task(self._run(), name="watch of the adapters")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def look(self) -> None:
        """One look. Where the folder cannot be read nothing is removed, and it is said once."""
        try:
            scan = await asyncio.to_thread(scan_folder, self._root, dict(self._changes.acted))
        except OSError as error:
            self._report(error)
            return
        if not scan and len(self._changes.acted) > 1:
            # Adapters go one by one; a folder that loses them all at once is most likely a volume that is not mounted.
            self._report(OSError(0, "it is empty; to remove the last adapters, leave one or forget them over HTTP"))
            return
        if self._fault is not None:
            _log.info("the watched folder can be read again", folder=str(self._root))
            self._fault = None
        await self._act(self._changes.of(scan))
        self.scans += 1

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look()
            except Exception:
                _log.exception("the watched folder could not be followed this time")

    async def _act(self, changes: Changes) -> None:
        for name, path in changes.vanished.items():
            if await self._admin.drop(name, path):
                _log.info("an adapter is gone with its folder", adapter=name)
            self._changes.accept(name, None)
        for name, found in changes.changed.items():
            await self._follow(name, found)

    async def _follow(self, name: str, found: Found) -> None:
        is_new = name not in self._changes.acted
        try:
            await self._admin.follow(name, found.path)
        except LoraplexError as error:
            if error.retryable:
                return  # there is no engine to verify it: the next look tries again
            _log.warning("a changed folder is refused; what was registered stays", adapter=name, reason=error.message)
        else:
            _log.info("an adapter's folder is new" if is_new else "an adapter's folder has changed", adapter=name)
        self._changes.accept(name, found)

    def _report(self, error: OSError) -> None:
        reason = f"{type(error).__name__}: {error.strerror}"
        if reason != self._fault:
            _log.warning("the watched folder cannot be read; adapters stay", folder=str(self._root), reason=reason)
        self._fault = reason
