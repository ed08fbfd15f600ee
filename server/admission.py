"""Admission: which waiting sequences come in, and when their adapters are fetched.

A waiting sequence is in one of three places. *In line*: ordered by arrival, considered a bounded number at a time.
*Loading*: its adapter is on its way from disk; it stands aside, so that it holds nobody up, and returns to its place.
*Deferred*: its adapter is not known to be on the host and enough others load already; it returns when one of them is
done. A preempted sequence gets back in line at its old place.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.adapter_directory import AdapterDirectory, AdapterFailed, AdapterLoading, AdapterReady
from loraplex.server.errors import AdapterTooLargeError, ContextLengthError, LoraplexError
from loraplex.server.messages import AdapterRef
from loraplex.server.request import Request, Sequence, SequenceState
from loraplex.server.scheduler_config import SchedulerConfig
from loraplex.server.step_plan import PageIn, StepPlan, cut_chunk

by_arrival = attrgetter("seq_id")
"""Sort key of sequences: ids rise with arrival."""

FailRequest = Callable[[Request, LoraplexError], None]


class ArrivalQueue:
    """Sequences ordered by arrival: the next ones are read in order, any one can be taken out."""

    def __init__(self) -> None:
        # A sorted list: arrivals go to its end, and moving even 10^4 pointers costs microseconds.
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=by_arrival)

    def first(self, count: int) -> list[Sequence]:
        """The earliest ones, as a new list."""
        return self._sequences[:count]

    def discard(self, sequence: Sequence) -> bool:
        """Take a sequence out; False if it is not here."""
        at = bisect_left(self._sequences, sequence.seq_id, key=by_arrival)
        found = at < len(self._sequences) and self._sequences[at] is sequence
        if found:
            del self._sequences[at]
        return found


class Admission:
    """Waiting sequences and the rule by which they come in.

    A sequence comes in when its adapter is on the host and the pool has pages for the adapter and for all tokens known
    so far, plus one page to grow unless nothing else runs; idle adapters count as free. It takes the pages at once:
    taken chunk by chunk, two half-computed prompts could wait for each other, and one would be computed twice.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        kv: KvCache,
        adapters: AdapterCache,
        directory: AdapterDirectory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._directory = directory
        self._clock = clock
        self._in_line = ArrivalQueue()
        self._deferred = ArrivalQueue()
        self._loading: dict[AdapterRef, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._in_line) + len(self._deferred) + sum(map(len, self._loading.values()))

    @property
    def num_in_line(self) -> int:
        """Sequences that nothing keeps from being considered in the next step."""
        return len(self._in_line)

    @property
    def loading(self) -> tuple[AdapterRef, ...]:
        """Adapters that waiting sequences stand aside for."""
        return tuple(self._loading)

    def submit(self, sequence: Sequence) -> None:
        """Put a waiting sequence in line at its place by arrival."""
        self._in_line.add(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        if self._in_line.discard(sequence) or self._deferred.discard(sequence):
            return
        ref = sequence.request.adapter
        assert ref is not None
        self._loading[ref].remove(sequence)
        if not self._loading[ref]:
            del self._loading[ref]

    def poll_adapters(self) -> None:
        """Put those back in line whose adapter is no longer loading."""
        for ref in list(self._loading):
            if not isinstance(self._directory.lookup(ref), AdapterLoading):
                for sequence in self._loading.pop(ref):
                    self._in_line.add(sequence)
        if len(self._loading) < self._config.max_loading:
            for sequence in self._deferred.first(self._config.look_ahead):
                self._deferred.discard(sequence)
                self._in_line.add(sequence)

    def admit(self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest) -> None:
        """Let sequences in, in order of arrival, and plan their first chunks and page-ins.

        Adapters of the sequences considered start to load even where nobody can come in. If the plan has no chunks
        afterwards, every sequence waits for an adapter.

        Args:
            plan: gets chunks and page-ins.
            running: gets those admitted, in order of arrival.
            budget: tokens left in this step; 0 admits nobody.
            fail: called for a request that can never run.
        """
        self._consider_first(plan, running, budget, fail)
        # While the machine would stand idle, the line is gone through to its end: who stands there may need no adapter.
        while len(self._in_line) and not plan.chunks:
            self._consider_first(plan, running, budget, fail)

    def _consider_first(self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest) -> None:
        limit = min(self._config.max_running, self._config.max_batch_tokens)
        blocked: Sequence | None = None
        for sequence in self._in_line.first(self._config.look_ahead):
            # A request that has just failed takes its other choices with it.
            if sequence.state is not SequenceState.WAITING or not self._has_adapter(sequence, fail):
                continue
            if budget <= 0 or len(running) >= limit:
                continue
            if blocked is not None and blocked.passed >= self._config.max_passes:
                continue
            if not self._fits(sequence, alone=not running):
                blocked = blocked or sequence
                continue
            if blocked is not None:
                blocked.passed += 1
            self._bring_in(sequence, plan)
            insort(running, sequence, key=by_arrival)
            chunk = cut_chunk(sequence, min(budget, self._config.prefill_chunk))
            plan.chunks.append(chunk)
            budget -= chunk.stop - chunk.start

    def _has_adapter(self, sequence: Sequence, fail: FailRequest) -> bool:
        """Whether the adapter is on the host; if not, the sequence is out of the line now."""
        request = sequence.request
        ref = request.adapter
        if ref is None or request.adapter_identity is not None:
            return True
        if ref in self._loading:
            self._stand_aside(sequence, ref)
            return False
        if not request.holds_adapter and len(self._loading) >= self._config.max_loading:
            self._in_line.discard(sequence)
            self._deferred.add(sequence)
            return False
        self._hold(request, ref)
        match self._directory.lookup(ref):
            case AdapterLoading():
                self._stand_aside(sequence, ref)
            case AdapterFailed(error):
                fail(request, error)
            case AdapterReady(identity, num_pages):
                return self._accept(request, ref, identity, num_pages, fail)
        return False

    def _hold(self, request: Request, ref: AdapterRef) -> None:
        if not request.holds_adapter:
            request.holds_adapter = True
            request.first_lookup_at = self._clock()
            self._directory.hold(ref)

    def _stand_aside(self, sequence: Sequence, ref: AdapterRef) -> None:
        self._hold(sequence.request, ref)
        sequence.request.waited_for_adapter = True
        self._in_line.discard(sequence)
        self._loading.setdefault(ref, []).append(sequence)

    def _accept(self, request: Request, ref: AdapterRef, identity: str, num_pages: int, fail: FailRequest) -> bool:
        """Note what the adapter takes; False, and the request has failed, where it can never run."""
        pool_pages = self._pool.num_pages
        prompt_pages = self._kv.pages_for(len(request.prompt_ids))
        if num_pages > pool_pages:
            fail(
                request,
                AdapterTooLargeError(
                    f"Adapter '{ref.name}' needs {num_pages} pages, but the pool has {pool_pages}.", param="adapter_id"
                ),
            )
            return False
        if num_pages + prompt_pages > pool_pages:
            fail(
                request,
                ContextLengthError(
                    f"The prompt of {len(request.prompt_ids)} tokens needs {prompt_pages} pages and adapter "
                    f"'{ref.name}' needs {num_pages}, but the pool has {pool_pages}.",
                    param="prompt",
                ),
            )
            return False
        request.adapter_identity = identity
        request.adapter_pages = num_pages
        request.max_total_tokens = min(request.max_total_tokens, max_tokens_in(pool_pages - num_pages, self._kv))
        return True

    def _fits(self, sequence: Sequence, *, alone: bool) -> bool:
        request = sequence.request
        identity = request.adapter_identity
        needed = self._kv.pages_for(sequence.num_tokens) + (0 if alone else 1)
        source = self._prompt_source(sequence)
        if source is not None:
            needed -= self._shareable(sequence) // self._kv.page_tokens
        if identity is not None and not self._adapters.is_resident(identity):
            needed += request.adapter_pages
        return needed <= self._pool.num_free + self._adapters.num_evictable_beside(identity)

    def _prompt_source(self, sequence: Sequence) -> Sequence | None:
        """A running choice of the same request whose prompt can be shared."""
        if len(sequence.request.sequences) == 1 or sequence.wants_prompt_logprobs:
            return None
        for other in sequence.request.sequences:
            if other.state is SequenceState.RUNNING and other.has_prompt_computed:
                return other
        return None

    def _shareable(self, sequence: Sequence) -> int:
        """Prompt tokens to take over: whole pages, and one token at least is left to compute for its logits."""
        tokens = min(len(sequence.prompt_ids), sequence.num_tokens - 1)
        return tokens - tokens % self._kv.page_tokens

    def _bring_in(self, sequence: Sequence, plan: StepPlan) -> None:
        """Take pages for the adapter and all known tokens; ``_fits`` has found that there are enough."""
        request = sequence.request
        was_resident = self._take_adapter(sequence, plan)
        source = self._prompt_source(sequence)
        if source is not None:
            sequence.num_computed = self._kv.share_prefix(source.seq_id, sequence.seq_id, self._shareable(sequence))
        if not sequence.has_output:
            sequence.cached_tokens = sequence.num_computed
        has_room = self._adapters.make_room(self._kv.missing_pages(sequence.seq_id, sequence.num_tokens))
        assert has_room, "a sequence came in for which there was no room"
        self._kv.extend(sequence.seq_id, sequence.num_tokens)
        self._in_line.discard(sequence)
        sequence.enter(SequenceState.RUNNING)
        sequence.passed = 0
        if sequence.first_scheduled_at is None:
            now = sequence.first_scheduled_at = self._clock()
            if request.first_lookup_at is not None:
                waited = request.waited_for_adapter or not was_resident
                sequence.adapter_load_seconds = now - request.first_lookup_at if waited else 0.0

    def _take_adapter(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Pin the adapter, if there is one, paging it in first where it is not in the pool. Returns whether it was."""
        request = sequence.request
        if request.adapter is None or request.adapter_identity is None:
            return True
        pages = self._adapters.admit(request.adapter_identity, request.adapter_pages)
        self._adapters.pin(request.adapter_identity)
        sequence.pinned = request.adapter_identity
        if pages is not None:
            plan.page_ins.append(PageIn(request.adapter_identity, request.adapter, pages))
        return pages is None

    def waiting(self) -> list[Sequence]:
        """Every waiting sequence here; for checks."""
        aside = [sequence for sequences in self._loading.values() for sequence in sequences]
        return [*self._in_line.first(len(self._in_line)), *self._deferred.first(len(self._deferred)), *aside]


def max_tokens_in(num_pages: int, kv: KvCache) -> int:
    """Tokens that a sequence can reach in this many pages: the last one sampled needs no room."""
    return num_pages * kv.page_tokens + 1
