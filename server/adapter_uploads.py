"""Adapters that are sent over HTTP: received into the state folder, verified there, and kept until they are removed.

An upload lies in a folder named by a hash of its files, so that the same files sent twice are stored once. It is moved
there in one rename, when all of it has come; what is cut off before is removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import structlog
from starlette.requests import Request

from loraplex.memory.adapter_config import CONFIG_NAME
from loraplex.server.adapter_admin import AdapterAdmin, Wishes
from loraplex.server.adapter_registry import AdapterRegistry, RegisteredAdapter, check_tags
from loraplex.server.engine_client import EngineClient
from loraplex.server.errors import InvalidRequestError, LoraplexError, OverloadedError, UnavailableError
from loraplex.server.lifecycle import check_ready
from loraplex.server.registry_file import KEPT, RegistryFile, folder_place, sync_folder
from loraplex.server.request_uploads import ARCHIVE, OVERHEAD_BYTES, UploadForm, too_large
from loraplex.server.upload_archive import FILE_NAMES, unpack_adapter

_log = structlog.get_logger(__name__)

RELEASE_SECONDS = 0.25
"""How often it is looked whether requests of a removed adapter have finished."""

_DISCARDED_BYTES = 64 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


class InsufficientStorageError(LoraplexError):
    """The disk has no room for what was sent."""

    status: ClassVar[int] = 507
    default_code: ClassVar[str | None] = "insufficient_storage"


class AdapterUploads:
    """Receives uploads, and removes their files once no name stands for them and no request uses them.

    Args:
        file: the state folder; without one nothing can be uploaded.
        max_bytes: of an upload, packed and unpacked.
        max_uploads: so many at once. Each may take ``max_bytes`` twice of the disk while it is checked.
    """

    def __init__(
        self,
        admin: AdapterAdmin,
        engine: EngineClient,
        registry: AdapterRegistry,
        file: RegistryFile | None,
        max_bytes: int,
        max_uploads: int,
    ) -> None:
        self._admin = admin
        self._engine = engine
        self._registry = registry
        self._file = file
        self._max_bytes = max_bytes
        self._max_uploads = max_uploads
        self._under_way = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._releases: set[asyncio.Task[None]] = set()

    async def receive(self, request: Request) -> RegisteredAdapter:
        """Reads a form, verifies the adapter in it, and registers it.

        Raises:
            InvalidRequestError: the form, a name or the adapter breaks a rule, or there is no state folder.
            PayloadTooLargeError: it exceeds the limit.
            InsufficientStorageError: the disk is full.
            OverloadedError: as many as may be are under way.
        """
        try:
            file = self._admitted(request)
        except LoraplexError:
            await _discard(request)
            raise
        self._under_way += 1
        try:
            return await self._staged(request, file)
        finally:
            self._under_way -= 1

    async def _staged(self, request: Request, file: RegistryFile) -> RegisteredAdapter:
        staging = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=file.staging))
        try:
            return await self._received(request, file, staging)
        except OSError as error:
            raise _storage_error(error) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)

    def release(self, adapter: RegisteredAdapter) -> None:
        """A registration is no more. Its files go when nothing uses them, if it was uploaded."""
        if adapter.origin == "upload":
            task = asyncio.get_running_loop().create_task(self._release(adapter), name="release of an upload")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def keep(self, adapter: RegisteredAdapter) -> None:
        """The files of an upload are to be left where they are when its name goes."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread((Path(adapter.ref.path) / KEPT).touch)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the serving. What is not released at the end is removed at the next start."""
        try:
            yield
        finally:
            for task in self._releases:
                task.cancel()
            await asyncio.gather(*self._releases, return_exceptions=True)

    def _admitted(self, request: Request) -> RegistryFile:
        if self._file is None:
            raise InvalidRequestError(
                "This server takes no uploads: it was started without the setting 'state_dir', the folder to keep them"
                " in.",
                code="uploads_disabled",
            )
        check_ready(self._engine)
        if self._under_way >= self._max_uploads:
            raise OverloadedError(
                f"{self._under_way} uploads are under way, and the limit is {self._max_uploads} ('max_uploads')."
            )
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() else 0
        if size > self._max_bytes + OVERHEAD_BYTES:
            raise too_large(self._max_bytes)
        if size > shutil.disk_usage(self._file.staging).free:
            raise InsufficientStorageError(f"The disk of 'state_dir' has no room for the {size} bytes of this upload.")
        return self._file

    async def _received(self, request: Request, file: RegistryFile, staging: Path) -> RegisteredAdapter:
        incoming, folder = staging / "incoming", staging / "adapter"
        incoming.mkdir()
        form = UploadForm(request, incoming, self._max_bytes + OVERHEAD_BYTES)
        await form.read()
        name, replace, wishes = self._asked(form)
        if ARCHIVE in form.files and len(form.files) > 1:
            raise InvalidRequestError(f"'{ARCHIVE}' is an archive; send it alone, or files without it.", param=ARCHIVE)
        if ARCHIVE in form.files:
            folder.mkdir()
            await asyncio.to_thread(unpack_adapter, incoming / ARCHIVE, folder, self._max_bytes)
        else:
            incoming.rename(folder)
        digest = await asyncio.to_thread(_checked_digest, folder, self._max_bytes)
        return await self._adopted(folder, file.adapters / digest, name, replace=replace, wishes=wishes)

    def _asked(self, form: UploadForm) -> tuple[str, bool, Wishes]:
        name = _last(form, "id")
        if name is None:
            raise InvalidRequestError("'id' is missing; it is required.", param="id")
        self._registry.check_name(name, "id")
        tags = form.fields.get("tags")
        wishes = Wishes(
            pinned=_truth(form, "pinned"),
            tags=None if tags is None else check_tags(tag for part in tags for tag in part.split(",") if tag.strip()),
        )
        return name, bool(_truth(form, "replace")), wishes

    async def _adopted(
        self, folder: Path, target: Path, name: str, *, replace: bool, wishes: Wishes
    ) -> RegisteredAdapter:
        async with self._lock(target):
            is_new = await asyncio.to_thread(_place, folder, target)
            try:
                return await self._admin.adopt(name, str(target), replace=replace, wishes=wishes)
            finally:
                if any(adapter.ref.path == str(target) for adapter in self._registry):
                    (target / KEPT).unlink(missing_ok=True)
                elif is_new:  # else whatever has brought it here sees to it
                    await self._remove_unused(target)

    async def _release(self, adapter: RegisteredAdapter) -> None:
        while self._engine.running(adapter.ref):  # noqa: ASYNC110 - nobody waits for this, and it is rare
            await asyncio.sleep(RELEASE_SECONDS)
        path = Path(adapter.ref.path)
        async with self._lock(path):
            await self._remove_unused(path)

    async def _remove_unused(self, path: Path) -> None:
        paths = {adapter.ref.path for adapter in self._registry}
        if str(path) not in paths and not await asyncio.to_thread(_must_stay, path, paths):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def _lock(self, path: Path) -> asyncio.Lock:
        return self._locks.setdefault(path.name, asyncio.Lock())


def _checked_digest(folder: Path, limit: int) -> str:
    """A name for a folder by its files, which are made to last on the disk."""
    names = _present(folder)
    if CONFIG_NAME not in names or len(names) < 2:
        wanted = " or ".join(name for name in FILE_NAMES if name != CONFIG_NAME)
        raise InvalidRequestError(f"The upload must hold {CONFIG_NAME} and {wanted}.", param=CONFIG_NAME)
    if sum((folder / name).stat().st_size for name in names) > limit:
        raise too_large(limit)
    return _digest(folder, names)


def _digest(folder: Path, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def _place(folder: Path, target: Path) -> bool:
    """Moves a folder to where it stays; true unless one is there already. That one's files are mended if need be."""
    is_new = not target.exists()
    if is_new:
        sync_folder(folder)
        folder.rename(target)
        sync_folder(target.parent)
    elif _digest(target, _present(target)) != target.name:
        _log.warning("files of an upload were damaged and are replaced", path=str(target))
        came = _present(folder)
        for name in came:
            (folder / name).replace(target / name)
        for name in set(_present(target)) - set(came):
            (target / name).unlink()
        sync_folder(target)
    return is_new


def _present(folder: Path) -> list[str]:
    return [name for name in FILE_NAMES if (folder / name).is_file()]


def _must_stay(path: Path, used: Iterable[str]) -> bool:
    """Whether a folder is to be kept, or is what one of the paths leads to in another spelling."""
    place = folder_place(path)
    return (path / KEPT).exists() or any(folder_place(one) == place for one in used)


async def _discard(request: Request) -> None:
    """Reads on for a while, so that a client which is still sending gets to hear why it was refused."""
    discarded = 0
    async for chunk in request.stream():
        discarded += len(chunk)
        if discarded > _DISCARDED_BYTES:
            return


def _storage_error(error: OSError) -> LoraplexError:
    if error.errno in _NO_ROOM:
        return InsufficientStorageError("The disk of 'state_dir' is full; nothing of the upload was kept.")
    _log.error("an upload cannot be stored", reason=error.strerror)
    return UnavailableError(f"The upload cannot be stored in 'state_dir': {error.strerror}.", code="state_dir")


def _last(form: UploadForm, name: str) -> str | None:
    values = form.fields.get(name)
    return None if values is None else values[-1]


def _truth(form: UploadForm, name: str) -> bool | None:
    text = _last(form, name)
    if text is None or not text:
        return None
    if text.lower() not in _TRUTHS:
        raise InvalidRequestError(f"'{name}' is {text[:20]!r}; accepted are true and false.", param=name)
    return _TRUTHS[text.lower()]
