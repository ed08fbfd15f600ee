"""SHA-256 over a file that is still being read."""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue
from types import TracebackType

_IN_THREAD = 1 << 20
"""From so many bytes on a thread of its own pays."""


class FileHash:
    """Hashes bytes as they arrive, beside whoever reads them, unpacks them and checks them.

    Used as a context while they arrive.

    Args:
        data: where the bytes arrive, in order.
    """

    def __init__(self, data: memoryview) -> None:
        self._data: memoryview | None = data
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._arrived: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True) if len(data) >= _IN_THREAD else None

    def __enter__(self) -> FileHash:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._arrived.put(None)
        if self._thread is None:
            self._work()

    def extend_to(self, end: int) -> None:
        """So many bytes have arrived in all."""
        self._arrived.put(end)

    def digest(self) -> bytes:
        """Of all that has arrived; waits until it is hashed. Only after the context has ended."""
        if self._thread is not None:
            self._thread.join()
        return self._hash.digest()

    def _work(self) -> None:
        assert self._data is not None
        while (end := self._arrived.get()) is not None:
            self._hash.update(self._data[self._hashed : end])
            self._hashed = end
        self._data = None
