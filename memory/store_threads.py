"""The loader threads of a host store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from traceback import format_exception

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.store_queue import LoadQueue
from loraplex.memory.store_records import Record

_log = logging.getLogger(__name__)


class LoaderThreads:
    """Threads that load what is queued. No exception ends one.

    Args:
        count: of threads.
        changed: the store's condition, notified whenever something may go on.
        load: loads one; called without the lock.
        fail: told an error of ``load``, likewise.
        on_change: called after each load, likewise.

    Attributes:
        queue: what to load; under the lock, and with a notification where something was added.
        closing: set once the threads are to end.
    """

    def __init__(
        self,
        count: int,
        changed: threading.Condition,
        load: Callable[[Record], None],
        fail: Callable[[Record, BaseException], None],
        on_change: Callable[[], None] | None,
    ) -> None:
        self.queue: LoadQueue[Record] = LoadQueue()
        self.closing = threading.Event()
        self._changed = changed
        self._load, self._fail, self._on_change = load, fail, on_change
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def start(self) -> None:
        """Begin to load."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads; loads under way are waited for."""
        with self._changed:
            self.closing.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (record := self._next()) is not None:
            self._run(record)
            del record  # while this thread waits for the next one, it holds no image

    def _next(self) -> Record | None:
        """Wait for a registration whose key no other thread is loading; None at the end."""
        with self._changed:
            while not self.closing.is_set():
                record = self.queue.start()
                if record is not None:
                    return record
                self._changed.wait()
        return None

    def _run(self, record: Record) -> None:
        try:
            self._load(record)
        except BaseException as error:
            if not isinstance(error, AdapterFileError):
                # As text: the frames of a traceback hold the file's bytes and tensors, and a log may keep it.
                _log.error("reading adapter %r failed: %s", record.key[0], "".join(format_exception(error)))
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._fail(record, error)
        with self._changed:
            self.queue.end(record.key)
            self._changed.notify_all()
        try:
            if self._on_change is not None:
                self._on_change()
        except Exception:
            _log.exception("on_change failed")
