"""The loader threads of a host store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from traceback import format_exception

import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.serial_torch import one_thread
from loraplex.memory.store_queue import LoadQueue
from loraplex.memory.store_records import Record

_log = logging.getLogger(__name__)


MOST_THREADS = 64
"""However many loads are stuck."""

_STUCK_SECONDS = 0.1
"""So long may a load of a small adapter take; most wait for a disk or a remote beyond that."""


class LoaderThreads:
    """Threads that load what is queued. No exception ends one, and none has torch share out its work to others.

    While they are stuck in loads that take long, as where a file system hangs, a remote is slow or an image waits for
    room, further ones are started: a load waits for no other one for much longer than a tenth of a second.

    Args:
        count: of threads that work when nothing is stuck.
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
        self._count = count
        self._torch_threads = torch.get_num_threads()
        self._busy_since: dict[int, float] = {}
        self._threads: list[threading.Thread] = []
        self._watch = threading.Thread(target=self._relieve, daemon=True)

    def start(self) -> None:
        """Begin to load."""
        for _ in range(self._count):
            self._add_thread()
        self._watch.start()

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _relieve(self) -> None:
        """Start a thread while something waits and fewer than ``count`` threads are free or have just begun."""
        while not self.closing.wait(_STUCK_SECONDS / 2):
            with self._changed:
                while not self.queue.has_next and not self.closing.is_set():
                    self._changed.wait()
                stuck_at = time.monotonic() - _STUCK_SECONDS
                stuck = sum(since < stuck_at for since in self._busy_since.values())
                free = len(self._threads) - stuck
                if self.queue.has_next and free < self._count and len(self._threads) < MOST_THREADS:
                    self._add_thread()

    def close(self) -> None:
        """End the threads; loads under way are waited for."""
        with self._changed:
            self.closing.set()
            self._changed.notify_all()
        self._watch.join()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (record := self._next()) is not None:
            self._run(record)
            del record  # while this thread waits for the next one, it holds no image

    def _next(self) -> Record | None:
        """Wait for a registration whose key no other thread is loading; None at the end."""
        me = threading.get_ident()
        with self._changed:
            self._busy_since.pop(me, None)
            while not self.closing.is_set():
                if self._is_spare():
                    self._threads.remove(threading.current_thread())
                    break
                record = self.queue.start()
                if record is not None:
                    self._busy_since[me] = time.monotonic()
                    return record
                self._changed.wait()
        return None

    def _is_spare(self) -> bool:
        """Whether a thread may end that was started while others were stuck."""
        free = len(self._threads) - len(self._busy_since)
        return not self.queue.has_next and len(self._threads) > self._count and free > self._count

    def _run(self, record: Record) -> None:
        try:
            with one_thread(afterwards=self._torch_threads):
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
