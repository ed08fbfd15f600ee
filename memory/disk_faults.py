"""Which errors are the local disk's, and what is said of them."""

from __future__ import annotations

import errno
from pathlib import Path

from loraplex.memory.adapter_errors import AdapterFileError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOCAL = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room."""
    return error.errno in _FULL


def is_local_fault(error: OSError) -> bool:
    """Whether an error is one of the local disk rather than of a connection."""
    return error.errno in _LOCAL


def disk_error(folder: Path, error: OSError) -> AdapterFileError:
    """What is told to those who wanted an adapter that the disk cache cannot hold."""
    if is_full(error):
        message = f"{folder}: no room on this disk; make some, or set disk_cache_bytes to less or cache_dir elsewhere"
        return AdapterFileError(message, key="disk_cache_bytes")
    reason = error.strerror or type(error).__name__
    return AdapterFileError(f"{folder}: {reason}; cache_dir must be a folder that can be written", key="cache_dir")
