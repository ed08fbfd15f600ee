"""Which adapter a loader thread reads next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class LoadQueue(Generic[Job]):
    """Jobs by key, first come first served, never two of one key at once. Each call takes the same time, however many
    there are. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, Job] = OrderedDict()
        self._held_up: dict[Hashable, Job] = {}  # another job of their key is running
        self._running: dict[Hashable, Job] = {}

    def __len__(self) -> int:
        """Jobs that have not been started."""
        return len(self._waiting) + len(self._held_up)

    @property
    def has_next(self) -> bool:
        """Whether a job could be started."""
        return bool(self._waiting)

    @property
    def running(self) -> tuple[Job, ...]:
        return tuple(self._running.values())

    def add(self, key: Hashable, job: Job) -> None:
        """Wait for a turn. No other job of the key may be waiting."""
        assert key not in self._waiting, f"{key!r} is waiting already"
        assert key not in self._held_up, f"{key!r} is waiting already"
        if key in self._running:
            self._held_up[key] = job
        else:
            self._waiting[key] = job

    def discard(self, key: Hashable) -> None:
        """Do not start the key's job, if it is waiting."""
        self._waiting.pop(key, None)
        self._held_up.pop(key, None)

    def start(self) -> Job | None:
        """The next job, which is running now; None where none may."""
        if not self._waiting:
            return None
        key, job = self._waiting.popitem(last=False)
        self._running[key] = job
        return job

    def end(self, key: Hashable) -> None:
        """The running job of a key is done. One that it held up is next."""
        del self._running[key]
        if key in self._held_up:
            self._waiting[key] = self._held_up.pop(key)
            self._waiting.move_to_end(key, last=False)

    def holds(self, job: Job) -> bool:
        """Whether a job is waiting or running."""
        return any(job is other for jobs in (self._waiting, self._held_up, self._running) for other in jobs.values())
