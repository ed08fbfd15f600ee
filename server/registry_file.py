"""The state folder of a server: what was registered over HTTP, written so that no crash can spoil it.

``registry.json`` is replaced as a whole, by a rename. A lock on ``lock`` keeps other servers out. Adapters that were
uploaded lie in ``adapters``, each in a folder named by a hash of its files; ``staging`` holds what is still coming.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from loraplex.memory.adapter_name import name_problem
from loraplex.server.adapter_registry import Origin, RegisteredAdapter
from loraplex.server.errors import LoraplexError

_log = structlog.get_logger(__name__)

VERSION = 1
FILE, LOCK, ADAPTERS, STAGING = "registry.json", "lock", "adapters", "staging"
CORRUPT = f"{FILE}.corrupt"
"""A spoilt ``registry.json``. While it lies there no upload is removed at the start: it may name them."""
KEPT = "kept"
"""A file that marks an uploaded adapter to be left where it is although no name stands for it."""

_WORD = re.compile(r"[\w.-]+")


class StateFolderError(LoraplexError):
    """The state folder cannot be used; the message begins with the setting's name."""

    default_code = "state_dir"


class SavedAdapter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A registration as it is kept. One of origin ``folder`` or ``setting`` only brings its pin and its tags."""

    name: str
    path: str
    origin: Origin
    created: int
    pinned: bool = False
    tags: tuple[str, ...] = ()
    identity: str | None = None


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    adapters: list[msgspec.Raw]


class _Written(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    adapters: Sequence[SavedAdapter | msgspec.Raw]


@dataclass(frozen=True, slots=True)
class _PassedOver:
    """An entry of no use now: as it stands in the file, with its name."""

    name: str
    entry: SavedAdapter | msgspec.Raw

    @property
    def words(self) -> set[str]:
        """All that its path may be made of, however little of the entry can be read."""
        return set(_WORD.findall(self.entry.path if isinstance(self.entry, SavedAdapter) else str(bytes(self.entry))))


class _Named(msgspec.Struct, frozen=True):
    name: str = "?"


class RegistryFile:
    """The state folder, held by this process alone until ``close``.

    Args:
        folder: made if it is not there.

    Raises:
        StateFolderError: it cannot be made, or another server holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._is_whole = True
        self._passed_over: list[_PassedOver] = []
        self._forgotten: set[str] = set()
        try:
            for part in (self.folder, self.adapters, self.staging):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _fault(self.folder, f"cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise _fault(self.folder, "is in use by another server; give each its own") from error

    @property
    def adapters(self) -> Path:
        """Where uploaded adapters lie."""
        return self.folder / ADAPTERS

    @property
    def staging(self) -> Path:
        """Where uploads are received."""
        return self.folder / STAGING

    def close(self) -> None:
        """Lets another server have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read(self) -> list[SavedAdapter]:
        """What was registered; entries that cannot be read are left out with a warning, a spoilt file is set aside.

        Entries that are left out stay in the file.

        Raises:
            StateFolderError: the file cannot be read, or is of a later version.
        """
        self._is_whole = True
        self._forgotten.clear()
        try:
            raw = (self.folder / FILE).read_bytes()
        except FileNotFoundError:
            self._is_whole = False
            return []
        except OSError as error:
            raise _fault(self.folder, f"{FILE} cannot be read: {error.strerror}") from error
        try:
            saved = msgspec.json.decode(raw, type=_Saved)
        except (msgspec.DecodeError, RecursionError) as error:
            self._set_aside(str(error))
            return []
        if saved.version > VERSION:
            raise _fault(self.folder, f"{FILE} was written by a later version; this one reads up to {VERSION}")
        entries = [(raw, _entry(raw)) for raw in saved.adapters]
        self._passed_over = [_PassedOver(_name_in(raw), raw) for raw, entry in entries if entry is None]
        return [entry for _, entry in entries if entry is not None]

    def pass_over(self, entry: SavedAdapter) -> None:
        """Keeps an entry that is of no use now, for when it is again; what it names is not removed.

        It goes once its name is registered or removed over HTTP.
        """
        self._passed_over.append(_PassedOver(entry.name, entry))

    def forget(self, name: str) -> None:
        """A name was removed: an entry of it that was passed over is not to come back, either."""
        self._forgotten.add(name)

    def write(self, adapters: Sequence[SavedAdapter]) -> None:
        """Replaces the file. StateFolderError where that cannot be; the old one is left then."""
        target, fresh = self.folder / FILE, self.folder / f"{FILE}.tmp"
        self._forgotten |= {one.name for one in adapters if one.origin in {"api", "upload"}}
        self._passed_over = [one for one in self._passed_over if one.name not in self._forgotten]
        written = _Written(version=VERSION, adapters=[*(one.entry for one in self._passed_over), *adapters])
        try:
            with fresh.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(written)))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(target)
            sync_folder(self.folder)
        except OSError as error:
            raise _fault(self.folder, f"{FILE} cannot be written: {error.strerror}") from error

    def sweep(self, used: Iterable[str]) -> None:
        """Removes what uploads have left behind that were cut off, or whose names were removed.

        Args:
            used: paths that names stand for.
        """
        left = list(self.staging.iterdir())
        if self._is_whole and not (self.folder / CORRUPT).exists():
            left += self._unused(used)
        (self.folder / f"{FILE}.tmp").unlink(missing_ok=True)
        for path in left:
            _log.info("what an upload has left behind is removed", path=str(path))
            shutil.rmtree(path, ignore_errors=True)

    def _unused(self, used: Iterable[str]) -> list[Path]:
        places = {folder_place(path) for path in used}
        words: set[str] = set().union(*(one.words for one in self._passed_over))
        return [
            one
            for one in self.adapters.iterdir()
            if folder_place(one) not in places and one.name not in words and not (one / KEPT).exists()
        ]

    def _set_aside(self, reason: str) -> None:
        """Keeps a spoilt file for whoever wants to mend it; uploads that it may have named are kept, too."""
        self._is_whole = False
        aside = self.folder / CORRUPT
        (self.folder / FILE).replace(aside)
        _log.error("the registry of adapters is spoilt and was set aside", file=str(aside), reason=reason)


def saved_adapters(adapters: Iterable[RegisteredAdapter]) -> list[SavedAdapter]:
    """What of a registry must survive: all that HTTP has brought, and pins and tags of the rest."""
    return [
        SavedAdapter(
            name=one.ref.name,
            path=one.ref.path,
            origin=one.origin,
            created=one.created,
            pinned=one.pinned,
            tags=one.tags,
            identity=one.identity,
        )
        for one in adapters
        if one.origin in {"api", "upload"} or one.pinned or one.tags
    ]


def folder_place(path: Path | str) -> tuple[int, int] | None:
    """Device and inode: the same for all spellings of a folder and for links to it. None where there is nothing."""
    try:
        found = os.stat(path)  # noqa: PTH116 - it is asked of each of ten thousand paths
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(raw: msgspec.Raw) -> SavedAdapter | None:
    try:
        entry = msgspec.json.decode(raw, type=SavedAdapter)
        reason = name_problem(entry.name)
    except (msgspec.DecodeError, RecursionError) as error:
        entry, reason = None, str(error)
    if reason is None:
        return entry
    _log.warning("an adapter of the registry's file is left out", adapter=_name_in(raw)[:80], reason=reason)
    return None


def _name_in(raw: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(raw, type=_Named).name
    except (msgspec.DecodeError, RecursionError):
        return "?"


def _fault(folder: Path, what: str) -> StateFolderError:
    return StateFolderError(f"state_dir: {folder} {what}", param="state_dir")
