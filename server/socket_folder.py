"""The folder of a server's sockets, and what servers that were killed have left of theirs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "loraplex-"
_OWNER = "owner"


class SocketFolder:
    """A new folder that only this user may enter, for as long as this process lives.

    Its owner's file is locked while the owner runs. The system lifts the lock when the owner ends, however it ends;
    that tells what a killed server left from what is in use, also where process ids mean nothing because servers in
    several containers share the place.

    Args:
        place: where it is made; the system's for temporary files if None.

    Attributes:
        path: of the folder.
    """

    def __init__(self, place: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if place is None else place
        _remove_stale(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        # Under its name the file is locked from the first moment on; where no locks can be had it never gets the name.
        unnamed = self.path / f"{_OWNER}.new"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, f"{os.getpid()}\n".encode())
            unnamed.rename(self.path / _OWNER)

    def remove(self) -> None:
        """Remove it with all that is in it; once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_stale(place: Path) -> None:
    """Remove folders of this user whose owner has ended; without an owner's file they may be about to get one."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if _is_stale(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    """Whether nobody holds the lock of a folder of ours; OSError where somebody does, or it is none of ours."""
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return False
    lock = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)
    return True
