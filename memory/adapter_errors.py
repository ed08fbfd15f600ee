"""The one error of everything that reads adapter folders."""

from __future__ import annotations

import errno

_SHOWN_CHARACTERS = 200

_PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
    }
)
"""Faults of a file system, often one on a network, that a second try may not meet."""


class AdapterFileError(Exception):
    """An adapter folder cannot be served as it stands.

    Args:
        message: what was wrong and what was expected; names the key.
        key: the tensor key, configuration key or file at fault, where there is one.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.key = None if key is None else shown(key)


class TransientReadError(AdapterFileError):
    """A read failed in a way that may pass: the same read may succeed in a moment."""


class AdapterChangedError(AdapterFileError):
    """Files no longer hold the content that was registered."""


def may_pass(error: BaseException) -> bool:
    """Whether what failed so is worth another try at once."""
    return isinstance(error, TransientReadError) or (isinstance(error, OSError) and error.errno in _PASSING)


def shown(value: object) -> str:
    """Text from a file as it may stand in a message: of bounded length, without control characters."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}..."
    return text if text.isprintable() else ascii(text)
