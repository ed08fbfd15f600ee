"""Whether the adapters of a waiting sequence are at hand, and what its request takes with them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from enum import Enum

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.adapter_directory import AdapterDirectory, AdapterFailed, AdapterLoading, AdapterReady
from loraplex.server.adapter_waits import AdapterWaits
from loraplex.server.engine_log import adapter_fields, debug
from loraplex.server.errors import (
    AdapterTooLargeError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    LoraplexError,
)
from loraplex.server.messages import AdapterRef, AdapterTier
from loraplex.server.request import NEVER, AdapterPages, Request, Sequence, invocation_start

FailRequest = Callable[[Request, LoraplexError], None]


class AtHand(Enum):
    """What came of looking for a sequence's adapters."""

    YES = "all are in the pool or on the host"
    LOADING = "some are on their way to the host; the sequence stands aside for them"
    TOO_MANY = "enough others load already"
    CONTENDED = "another mix holds some adapters while it waits for others"
    FAILED = "one cannot be served; the request has failed"


class AdapterGate:
    """Holds adapters for waiting sequences, and lets those pass whose adapters are at hand.

    Args:
        pool, kv, adapters: in which they will run.
        directory: of the adapters.
        max_loading: adapters that may load at once; the last mix to be let in may exceed it.
        note_arrival: is told of each request's adapters, by identity.
        clock: monotonic seconds.

    Attributes:
        waits: who stands aside for which adapter.
        lookups: how often adapters were found in a tier, or not, by (tier, "hit" or "miss"): once for each adapter of
            a sequence that came in.
    """

    def __init__(
        self,
        pool: PagePool,
        kv: KvCache,
        adapters: AdapterCache,
        directory: AdapterDirectory,
        max_loading: int,
        note_arrival: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._directory = directory
        self._max_loading = max_loading
        self._note_arrival = note_arrival
        self._clock = clock
        self.waits = AdapterWaits(directory)
        self._partial: set[Sequence] = set()  # under mixes: they hold some adapters and wait for others
        self.lookups: Counter[tuple[AdapterTier, str]] = Counter()

    @property
    def has_room(self) -> bool:
        """Whether another adapter may start to load."""
        return len(self.waits.loading) < self._max_loading

    def check(self, sequence: Sequence, fail: FailRequest) -> AtHand:
        """Look for the adapters of a sequence in line. What is neither in the pool nor on the host starts to load."""
        request = sequence.request
        if not request.weights or self._all_resident(request):
            return AtHand.YES
        if not sequence.holds_adapters:
            if not self.has_room and any(self._would_load(ref) for ref in request.weights):
                return AtHand.TOO_MANY
            if self._would_contend(request):
                return AtHand.CONTENDED
            self._hold(sequence)
        loading: list[AdapterRef] = []
        ready: list[tuple[AdapterRef, AdapterReady]] = []
        for ref in request.weights:
            match self._directory.lookup(ref):
                case AdapterLoading():
                    loading.append(ref)
                case AdapterFailed(error):
                    request.failed_adapter = ref.name
                    fail(request, error)
                    return AtHand.FAILED
                case AdapterReady() as status:
                    ready.append((ref, status))
        if loading:
            if len(request.weights) > 1:
                self._partial.add(sequence)
            if not request.waited_for_adapter:
                debug("a request waits", request_id=request.origin, **adapter_fields([ref.name for ref in loading]))
            request.waited_for_adapter = True
            self.waits.add(sequence, loading)
            return AtHand.LOADING
        self._partial.discard(sequence)
        accepted = self._is_unchanged if request.adapters is not None else self._accept
        return AtHand.YES if accepted(request, ready, fail) else AtHand.FAILED

    def _is_unchanged(self, request: Request, ready: list[tuple[AdapterRef, AdapterReady]], fail: FailRequest) -> bool:
        """Whether adapters that a request began with are what they were; if not, the request has failed."""
        identities = {image.identity for image in request.images}
        for ref, status in ready:
            if request.images and status.identity not in identities:
                message = f"Adapter '{ref.name}' was replaced before the request could go on."
                fail(request, ConflictError(message, param="adapter_id"))
                return False
        return True

    def _all_resident(self, request: Request) -> bool:
        """Whether the request has been accepted, and everything that it needs lies in the pool."""
        return request.adapters is not None and all(
            self._adapters.is_resident(image.identity) for image in request.images
        )

    def _would_load(self, ref: AdapterRef) -> bool:
        return ref not in self.waits.loading and not self._directory.is_at_hand(ref)

    def _would_contend(self, request: Request) -> bool:
        """Whether a mix would hold some adapters while it waits for others, as another one does already: they could
        keep each other from the host."""
        return (
            len(request.weights) > 1
            and any(sequence.request is not request for sequence in self._partial)
            and not all(self._directory.is_at_hand(ref) for ref in request.weights)
        )

    def _hold(self, sequence: Sequence) -> None:
        sequence.holds_adapters = True
        request = sequence.request
        if request.first_lookup_at is None:
            request.first_lookup_at = self._clock()
        for ref in request.weights:
            self._directory.hold(ref)

    def let_go(self, sequence: Sequence) -> None:
        """A sequence waits for its adapters no longer: it has them in the pool, or has ended."""
        self.waits.discard(sequence)
        self._partial.discard(sequence)
        if sequence.holds_adapters:
            sequence.holds_adapters = False
            for ref in sequence.request.weights:
                self._directory.release_hold(ref)

    def count_lookups(self, sequence: Sequence, missing: list[AdapterPages]) -> None:
        """A sequence comes in for the first time, and these of its adapters are not in the pool."""
        request = sequence.request
        self.lookups["pool", "hit"] += len(request.images) - len(missing)
        self.lookups["pool", "miss"] += len(missing)
        if request.waited_for_adapter:
            self.lookups["host", "miss"] += 1
            self.lookups["host", "hit"] += max(0, len(missing) - 1)
        else:
            self.lookups["host", "hit"] += len(missing)

    def _accept(self, request: Request, ready: list[tuple[AdapterRef, AdapterReady]], fail: FailRequest) -> bool:
        """Note what the adapters are and take; False, and the request has failed, where it can never run."""
        for ref, status in ready:
            if request.is_mix and status.mix_problem is not None:
                fail(request, InvalidRequestError(f"Adapter '{ref.name}' {status.mix_problem}.", param="adapter_id"))
                return False
            if self._note_arrival is not None:
                self._note_arrival(status.identity)
        if len(ready) == 1:
            request.adapter_start = invocation_start(request.prompt_ids, ready[0][1].invocation)
        if request.adapter_start == NEVER:
            request.adapters = ()
            return True
        weights: dict[str, float] = {}
        images: dict[str, AdapterPages] = {}
        for ref, status in ready:
            # Two names may stand for the same content.
            weights[status.identity] = weights.get(status.identity, 0.0) + request.weights[ref]
            images.setdefault(
                status.identity,
                AdapterPages(
                    status.identity,
                    ref,
                    status.num_pages,
                    status.routes_by_token,
                    status.changes_kv,
                    status.kind,
                    status.num_bytes,
                ),
            )
            if request.waited_for_adapter:
                request.loads[status.identity] = tuple(
                    load for load in status.loads if load.ended is not None and load.ended > request.arrival
                )
        request.images = tuple(images.values())
        num_pages = request.num_adapter_pages
        if error := self._size_problem(request, num_pages):
            fail(request, error)
            return False
        # In one order, so that equal mixes are summed alike.
        request.adapters = tuple(sorted(weights.items()))
        longest = max_tokens_in(self._pool.num_pages - num_pages, self._kv)
        request.max_total_tokens = min(request.max_total_tokens, longest)
        return True

    def _size_problem(self, request: Request, num_pages: int) -> LoraplexError | None:
        """Why adapters that take ``num_pages`` can never be in the pool beside the prompt."""
        pool_pages = self._pool.num_pages
        prompt_pages = self._kv.pages_for(len(request.prompt_ids))
        names = " and ".join(f"'{image.ref.name}'" for image in request.images)
        needs = f"adapter {names} needs" if len(request.images) == 1 else f"adapters {names} together need"
        if num_pages > pool_pages:
            message = f"{needs[0].upper()}{needs[1:]} {num_pages} pages, but the pool has {pool_pages}."
            return AdapterTooLargeError(message, param="adapter_id")
        if num_pages + prompt_pages > pool_pages:
            return ContextLengthError(
                f"The prompt of {len(request.prompt_ids)} tokens needs {prompt_pages} pages and {needs} {num_pages}, "
                f"but the pool has {pool_pages}.",
                param="prompt",
            )
        return None


def max_tokens_in(num_pages: int, kv: KvCache) -> int:
    """Tokens that a sequence can reach in this many pages: the last one sampled needs no room."""
    return num_pages * kv.page_tokens + 1
