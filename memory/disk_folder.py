"""The folder of a disk cache: entries that appear and go at once, shared by processes, safe to be killed in.

    lock          taken for each change; counts the changes, so that a process sees whether others made any
    entries/NAME  an adapter's files, and ``entry.json``; NAME is the source's hash, its version, a number
    tmp/NAME      an entry on its way in or out
    locks/HASH    taken while a source is being fetched

Who reads an entry holds its ``entry.json`` locked for sharing; who removes it must have it alone. All locks are of the
kernel's (flock) and go with their process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex

from loraplex.memory.source_remote import RemoteListing

_RECORD = "entry.json"
_COUNTER_BYTES = 8
_ABSENT = (FileNotFoundError, NotADirectoryError)
_UNREADABLE = (*_ABSENT, ValueError, TypeError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """What is written beside an entry's files.

    Attributes:
        url: of the source.
        version: of its content, as in ``RemoteListing``.
        files: size in bytes by name.
        fetch_seconds: that the download took.
        number: random, so that no two downloads share a name.
    """

    url: str
    version: str
    files: Mapping[str, int]
    fetch_seconds: float
    number: str

    @classmethod
    def of(cls, url: str, listing: RemoteListing) -> EntryRecord:
        """The record of an entry that is about to be fetched."""
        return cls(url, listing.version, {file.name: file.size for file in listing.files}, 0.0, token_hex(4))

    @property
    def name(self) -> str:
        return f"{_hash(self.url)}-{self.version}-{self.number}"

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


class CacheFolder:
    """One cache's folder. Its user calls from one thread at a time, but for ``fetching``, ``share`` and downloads.

    Args:
        root: made if absent.

    Errors: OSError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries, self._tmp, self._locks = root / "entries", root / "tmp", root / "locks"
        self._seen = -1
        root.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where an entry's files are."""
        return self._entries / name

    def pending_path(self, name: str) -> Path:
        """Where an entry is being fetched to."""
        return self._tmp / name

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Keep other processes from changing anything; tells whether they have since this was last left in order."""
        with _locked(self.root / "lock", fcntl.LOCK_EX) as descriptor:
            count = int.from_bytes(os.pread(descriptor, _COUNTER_BYTES, 0), "little")
            others_changed = count != self._seen
            # Counted before anything changes: who is killed in between has told the others.
            os.pwrite(descriptor, (count + 1).to_bytes(_COUNTER_BYTES, "little"), 0)
            self._seen = -1
            # Each time, for somebody may clear the folder while it is in use.
            self._entries.mkdir(exist_ok=True)
            self._tmp.mkdir(exist_ok=True)
            yield others_changed
            self._seen = count + 1

    @contextmanager
    def fetching(self, url: str) -> Iterator[None]:
        """Be the only one, in all processes, to fetch a source; waits for whoever does."""
        path = self._locks / _hash(url)
        while True:
            with _locked(path, fcntl.LOCK_EX) as descriptor:
                if not _is_at(descriptor, path):
                    continue
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    def names(self) -> set[str]:
        """All entries."""
        return {entry.name for entry in os.scandir(self._entries)}

    def read(self, name: str) -> tuple[EntryRecord, float] | None:
        """An entry's record and when it was last used (seconds since the epoch); None if it is not as recorded."""
        folder = self.path(name)
        try:
            record = _parsed((folder / _RECORD).read_bytes())
            used = (folder / _RECORD).stat().st_mtime
        except _UNREADABLE:
            return None
        return (record, used) if record.name == name and _is_whole(folder, record) else None

    def pending(self) -> dict[str, int]:
        """Bytes that are being fetched, by entry, by any process. What nobody works at any more is removed."""
        found = {}
        for folder in self._tmp.iterdir():
            if self._is_abandoned(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                found[folder.name] = _recorded_bytes(folder)
        return found

    def clear_pending(self, url: str) -> list[str]:
        """Remove what others left of fetching a source, and name it; within ``changing`` and ``fetching``."""
        left = list(self._tmp.glob(f"{_hash(url)}-*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        return [folder.name for folder in left]

    def begin(self, record: EntryRecord) -> Path:
        """Make the folder that an entry is fetched to; within ``changing`` and ``fetching``."""
        folder = self.pending_path(record.name)
        folder.mkdir()
        _write_record(folder, record)
        return folder

    def abandon(self, name: str) -> None:
        """Remove what was fetched of an entry; within ``changing``."""
        shutil.rmtree(self.pending_path(name), ignore_errors=True)

    def seal(self, record: EntryRecord) -> bool:
        """Bring a fetched entry to the disk for good; False if its files are not as recorded."""
        folder = self.pending_path(record.name)
        if not _is_whole(folder, record):
            return False
        _write_record(folder, record)
        for path in (*(folder / name for name in (*record.files, _RECORD)), folder):
            _sync(path)
        return True

    def commit(self, name: str) -> None:
        """Make a sealed entry appear; within ``changing``."""
        self.pending_path(name).rename(self.path(name))
        _sync(self._entries)

    def share(self, record: EntryRecord) -> int | None:
        """Hold an entry, until the descriptor is closed; None if it is gone, going, or not as recorded."""
        folder = self.path(record.name)
        descriptor = _opened(folder / _RECORD)
        if descriptor is None:
            return None
        held = False
        try:
            held = _try_lock(descriptor, fcntl.LOCK_SH) and _is_at(descriptor, folder / _RECORD)
            held = held and _is_whole(folder, record)
            if held:
                os.utime(descriptor)
        finally:
            if not held:
                os.close(descriptor)
        return descriptor if held else None

    def remove(self, name: str) -> bool:
        """Remove an entry unless somebody reads it; within ``changing``. True if it is gone."""
        folder = self.path(name)
        descriptor = _opened(folder / _RECORD)
        if descriptor is None:
            shutil.rmtree(folder, ignore_errors=True)
            return not folder.exists()
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                return False
            # Gone at once, and cleared away later should this process be killed here.
            leaving = self._tmp / f"{name}-leaving"
            shutil.rmtree(leaving, ignore_errors=True)
            folder.rename(leaving)
            shutil.rmtree(leaving)
        finally:
            os.close(descriptor)
        return True

    def _is_abandoned(self, name: str) -> bool:
        path = self._locks / name.partition("-")[0]
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as descriptor:
            if descriptor < 0:
                return False
            if _is_at(descriptor, path):
                path.unlink()
            return True


def _hash(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:32]


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    """A descriptor that holds a lock on a file, made if absent; -1 if it should not wait and somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if how & fcntl.LOCK_NB:
            yield descriptor if _try_lock(descriptor, how) else -1
        else:
            fcntl.flock(descriptor, how)
            yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR)
    except _ABSENT:
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that was opened: another may have removed it before the lock was had."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except _ABSENT:
        return False


def _is_whole(folder: Path, record: EntryRecord) -> bool:
    try:
        return all((folder / name).lstat().st_size == size for name, size in record.files.items())
    except _ABSENT:
        return False


def _recorded_bytes(folder: Path) -> int:
    try:
        return _parsed((folder / _RECORD).read_bytes()).num_bytes
    except _UNREADABLE:
        return 0


def _parsed(data: bytes) -> EntryRecord:
    """A record; what is none raises one of ``_UNREADABLE``."""
    raw = json.loads(data)
    files = {str(name): int(size) for name, size in raw.pop("files").items()}
    if any("/" in name or size < 0 for name, size in files.items()):
        raise ValueError("not the record of an entry")
    return EntryRecord(str(raw["url"]), str(raw["version"]), files, float(raw["fetch_seconds"]), str(raw["number"]))


def _write_record(folder: Path, record: EntryRecord) -> None:
    # At once, for others read it meanwhile to know what is being fetched.
    new = folder / f"{_RECORD}.new"
    new.write_text(json.dumps(asdict(record)))
    new.replace(folder / _RECORD)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
