"""Adapters on their way from the host into the pool."""

from __future__ import annotations

import time
from collections.abc import Callable

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.server.adapter_directory import AdapterDirectory
from loraplex.server.messages import AdapterRef
from loraplex.server.request import AdapterPages, CopyTimes
from loraplex.server.step_plan import PageIn


class PageIns:
    """Copies that have been planned. Until one is over, its adapter stays in the pool and its image on the host.

    Args:
        adapters: in the pool.
        directory: of the images on the host.
        clock: monotonic seconds.
    """

    def __init__(
        self, adapters: AdapterCache, directory: AdapterDirectory, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._adapters = adapters
        self._directory = directory
        self._clock = clock
        self._under_way: dict[str, AdapterRef] = {}
        self._times: dict[str, CopyTimes] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def under_way(self) -> tuple[str, ...]:
        """Identities of the adapters that have not arrived."""
        return tuple(self._under_way)

    def begin(self, image: AdapterPages) -> PageIn:
        """Give pages to an adapter that has none and whose image is held on the host.

        Raises:
            OutOfPages: there are none, not even idle ones; nothing has changed.
        """
        pages = self._adapters.admit(image.identity, image.num_pages)
        assert pages is not None, f"adapter {image.identity} is in the pool already"
        self._adapters.pin(image.identity)
        self._directory.hold(image.ref)
        self._under_way[image.identity] = image.ref
        self._times[image.identity] = CopyTimes(self._clock())
        return PageIn(image.identity, image.ref, pages)

    def times(self, identity: str) -> CopyTimes:
        """Of a copy under way; whoever keeps this sees when it ended."""
        return self._times[identity]

    def note_copied(self, identity: str) -> None:
        """A copy under way is over; that the adapter has arrived is told later."""
        self._times[identity].ended = self._clock()

    def end(self, identity: str) -> None:
        """An adapter has arrived."""
        if (times := self._times.pop(identity)).ended is None:
            times.ended = self._clock()
        self._directory.release_hold(self._under_way.pop(identity))
        self._adapters.unpin(identity)

    def give_up(self) -> None:
        """Copies under way may come to nothing: whatever lies in their pages, they hold no adapters."""
        for identity in self.under_way:
            self._adapters.drop(identity)
            self.end(identity)
