"""The one error of everything that reads adapter folders."""

from __future__ import annotations

_SHOWN_CHARACTERS = 200


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


def shown(value: object) -> str:
    """Text from a file as it may stand in a message: of bounded length, without control characters."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}..."
    return text if text.isprintable() else ascii(text)
