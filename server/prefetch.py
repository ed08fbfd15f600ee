"""Prefetching: adapters come into the pool before anyone in a step needs them.

In this order: adapters that an operator has pinned and that are not there; those that somebody asked to be fetched;
those of sequences next in line, which could not come in because the step is full; and, into pages that are free anyway,
those that have been wanted most often lately.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.adapter_directory import AdapterDirectory, AdapterReady
from loraplex.server.messages import AdapterRef
from loraplex.server.page_ins import PageIns
from loraplex.server.request import AdapterPages, Sequence
from loraplex.server.step_plan import StepPlan


class Prefetcher:
    """Plans copies into the pool that no sequence of the step needs.

    What runs is never put out for them, nor is the last page that a running sequence may need next. For a sequence in
    line idle things go as they would when it comes in.

    Args:
        limit: so many adapters may be on their way at once, whoever wants them, before nothing more is prefetched.
        pool, adapters: the pool.
        directory: of the images on the host.
        page_ins: what is on its way.

    Attributes:
        prefetched: adapters so far.
    """

    def __init__(
        self, limit: int, pool: PagePool, adapters: AdapterCache, directory: AdapterDirectory, page_ins: PageIns
    ) -> None:
        self._limit = limit
        self._pool = pool
        self._adapters = adapters
        self._directory = directory
        self._page_ins = page_ins
        self._asked: dict[str, AdapterPages] = {}
        self._kept: dict[str, AdapterPages] = {}
        self.prefetched = 0

    @property
    def has_work(self) -> bool:
        """Whether there is something to bring in that no sequence waits for."""
        return bool(self._asked) or any(identity in self._kept for identity in self._adapters.missing_kept)

    def ask(self, image: AdapterPages) -> None:
        """Bring in an adapter once, if there is room. Whoever asks holds it on the host while it ``is_asked``."""
        if not self._adapters.is_resident(image.identity):
            self._asked[image.identity] = image

    def is_asked(self, identity: str) -> bool:
        """Whether an adapter that was asked for has neither come in nor been found to have no room."""
        return identity in self._asked

    def keep(self, image: AdapterPages) -> None:
        """Bring in an adapter whenever it is not there, until ``forget``."""
        self._kept[image.identity] = image
        self._adapters.keep(image.identity)

    def move(self, identity: str, ref: AdapterRef) -> None:
        """A kept adapter is to be read under another registration from now on."""
        self._kept[identity] = replace(self._kept[identity], ref=ref)

    def unkeep(self, identity: str) -> None:
        """Undo ``keep``; unknown ones are ignored."""
        self._kept.pop(identity, None)
        self._adapters.unkeep(identity)

    @property
    def kept_pages(self) -> int:
        """Pages that the kept adapters take when they are all there."""
        return sum(image.num_pages for image in self._kept.values())

    def is_kept(self, identity: str) -> bool:
        return identity in self._kept

    def plan(self, plan: StepPlan, next_in_line: Iterable[Sequence], *, reserve: int) -> None:
        """Add page-ins to a plan.

        Args:
            plan: of the step; everything that the step itself needs is in it.
            next_in_line: waiting sequences that nothing but the step's limits kept out.
            reserve: pages that are left for those who run.
        """
        for image in [self._kept[identity] for identity in self._adapters.missing_kept if identity in self._kept]:
            self._bring(image, plan, reserve)
        for image in list(self._asked.values()):
            if self._may_begin:
                del self._asked[image.identity]
                self._bring(image, plan, reserve)
        self._bring_next(islice(next_in_line, self._limit), plan, reserve)

    def _bring_next(self, sequences: Iterable[Sequence], plan: StepPlan, reserve: int) -> None:
        """What the next in line miss, in their order, without putting out what they have."""
        wanted = [image for sequence in sequences for image in sequence.request.images]
        here = {image.identity for image in wanted if self._adapters.is_resident(image.identity)}
        for identity in here:
            self._adapters.pin(identity)
        for image in wanted:
            if not self._adapters.is_resident(image.identity) and not self._bring(image, plan, reserve):
                break
        for identity in here:
            self._adapters.unpin(identity)

    @property
    def _may_begin(self) -> bool:
        return len(self._page_ins) < max(1, self._limit)

    def _bring(self, image: AdapterPages, plan: StepPlan, reserve: int) -> bool:
        """Plan one page-in; False where there is no room, or nothing on the host."""
        if not self._may_begin or self._adapters.is_resident(image.identity):
            return False
        if image.num_pages + reserve > self._pool.num_reachable:
            return False
        self._directory.hold(image.ref)
        found = self._directory.lookup(image.ref)
        is_there = isinstance(found, AdapterReady) and found.identity == image.identity
        if is_there:
            plan.page_ins.append(self._page_ins.begin(image))
            self.prefetched += 1
        self._directory.release_hold(image.ref)
        return is_there
