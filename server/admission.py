"""Admission: which waiting sequences come in, and when their adapters are fetched.

A waiting sequence is in one of three places. *In line*: ordered by arrival, considered a bounded number at a time.
*Loading*: some of its adapters are on their way from disk; it stands aside (see ``adapter_waits.py``), so that it holds
nobody up, and returns to its place. *Deferred*: its adapters are not known to be on the host and enough others load
already; it returns when one of them is done. A preempted sequence gets back in line at its old place.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PageChain, PrefixMatch
from loraplex.server.adapter_directory import AdapterDirectory, AdapterFailed, AdapterLoading, AdapterReady
from loraplex.server.adapter_waits import AdapterWaits
from loraplex.server.errors import AdapterTooLargeError, ContextLengthError, InvalidRequestError, LoraplexError
from loraplex.server.messages import AdapterRef, Generate
from loraplex.server.request import NEVER, AdapterPages, Request, Sequence, SequenceState, invocation_start
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

    A sequence comes in when its adapters are on the host and the pool has pages for them and for all tokens known so
    far, plus one page to grow unless nothing else runs; what is idle counts as free, and cached pages that it can begin
    with count as its own. It takes the pages at once: taken chunk by chunk, two half-computed prompts could wait for
    each other, and one would be computed twice.

    Attributes:
        prefix_hit_tokens: tokens that sequences did not have to compute, so far.
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
        self._waits = AdapterWaits(directory)
        self.prefix_hit_tokens = 0

    @property
    def num_in_line(self) -> int:
        """Sequences that nothing keeps from being considered in the next step."""
        return len(self._in_line)

    @property
    def loading(self) -> tuple[AdapterRef, ...]:
        """Adapters that waiting sequences stand aside for."""
        return self._waits.loading

    def check_prompt(self, generate: Generate) -> None:
        """ContextLengthError or InvalidRequestError for a prompt that can never run, whatever its adapters take."""
        num_prompt, limit = len(generate.prompt_ids), self._config.max_model_len
        if num_prompt == 0:
            raise InvalidRequestError("The prompt is empty; it must have at least one token.", param="prompt")
        needed = num_prompt + (1 if generate.params.max_tokens else 0)
        if needed > limit:
            room = "" if needed == num_prompt else " and room for one more is needed"
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens{room}, but the model's context is {limit}.", param="prompt"
            )
        pages = self._kv.pages_for(num_prompt)
        if pages > self._pool.num_pages:
            raise ContextLengthError(
                f"The prompt of {num_prompt} tokens needs {pages} pages, but the pool has {self._pool.num_pages}.",
                param="prompt",
            )

    def submit(self, sequence: Sequence) -> None:
        """Put a waiting sequence in line at its place by arrival."""
        self._in_line.add(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        if self._in_line.discard(sequence) or self._deferred.discard(sequence):
            return
        self._waits.discard(sequence)

    def poll_adapters(self, fail: FailRequest) -> None:
        """Put those back in line whose adapters are no longer loading."""
        for sequence in self._waits.poll():
            self._in_line.add(sequence)
        if given_up := self._waits.give_up(self._clock()):
            fail(*given_up)
        if len(self._waits.loading) < self._config.max_loading:
            for sequence in self._deferred.first(self._config.look_ahead):
                self._deferred.discard(sequence)
                self._in_line.add(sequence)

    def admit(
        self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest, *, idle: bool = True
    ) -> None:
        """Let sequences in, in order of arrival, and plan their first chunks and page-ins.

        Adapters of the sequences considered start to load even where nobody can come in. If the plan of an idle machine
        has no chunks afterwards, every sequence waits for an adapter.

        Args:
            plan: gets chunks and page-ins.
            running: gets those admitted, in order of arrival.
            budget: tokens left in this step; 0 admits nobody.
            fail: called for a request that can never run.
            idle: whether no step is in flight: one in flight may hold what those in line need.
        """
        self._consider_first(plan, running, budget, fail)
        # While the machine would stand idle, the line is gone through to its end: who stands there may need no adapter.
        while idle and len(self._in_line) and not plan.chunks:
            self._consider_first(plan, running, budget, fail)

    def _consider_first(self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest) -> None:
        limit = min(self._config.max_running, self._config.max_batch_tokens)
        blocked: Sequence | None = None
        for sequence in self._in_line.first(self._config.look_ahead):
            # A request that has just failed takes its other choices with it.
            if sequence.state is not SequenceState.WAITING or not self._has_adapters(sequence, fail):
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

    def _has_adapters(self, sequence: Sequence, fail: FailRequest) -> bool:
        """Whether the adapters are on the host; if not, the sequence is out of the line now."""
        request = sequence.request
        if request.adapters is not None:
            return True
        is_new = any(ref not in self._waits.loading for ref in request.weights)
        if is_new and not request.holds_adapters and len(self._waits.loading) >= self._config.max_loading:
            self._in_line.discard(sequence)
            self._deferred.add(sequence)
            return False
        self._hold(request)
        loading: list[AdapterRef] = []
        ready: list[tuple[AdapterRef, AdapterReady]] = []
        for ref in request.weights:
            match self._directory.lookup(ref):
                case AdapterLoading():
                    loading.append(ref)
                case AdapterFailed(error):
                    fail(request, error)
                    return False
                case AdapterReady() as status:
                    ready.append((ref, status))
        if loading:
            request.waited_for_adapter = True
            self._in_line.discard(sequence)
            self._waits.add(sequence, loading)
            return False
        return self._accept(request, ready, fail)

    def _hold(self, request: Request) -> None:
        if not request.holds_adapters:
            request.holds_adapters = True
            request.first_lookup_at = self._clock()
            for ref in request.weights:
                self._directory.hold(ref)

    def _accept(self, request: Request, ready: list[tuple[AdapterRef, AdapterReady]], fail: FailRequest) -> bool:
        """Note what the adapters are and take; False, and the request has failed, where it can never run."""
        for ref, status in ready:
            if request.is_mix and status.mix_problem is not None:
                fail(request, InvalidRequestError(f"Adapter '{ref.name}' {status.mix_problem}.", param="adapter_id"))
                return False
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
                status.identity, AdapterPages(status.identity, ref, status.num_pages, status.routes_by_token)
            )
        request.images = tuple(images.values())
        pool_pages, num_pages = self._pool.num_pages, request.num_adapter_pages
        if error := self._size_problem(request, num_pages):
            fail(request, error)
            return False
        # In one order, so that equal mixes are summed alike.
        request.adapters = tuple(sorted(weights.items()))
        request.max_total_tokens = min(request.max_total_tokens, max_tokens_in(pool_pages - num_pages, self._kv))
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

    def _fits(self, sequence: Sequence, *, alone: bool) -> bool:
        request = sequence.request
        needed = self._kv.pages_for(sequence.num_tokens) + (0 if alone else 1)
        reachable = self._pool.num_reachable
        if request.images:
            resident = [image for image in request.images if self._adapters.is_resident(image.identity)]
            needed += request.num_adapter_pages - sum(image.num_pages for image in resident)
            reachable -= self._adapters.num_evictable_of(image.identity for image in resident)
        if needed <= reachable:
            return True
        found = self._match(sequence)
        # What it will begin with needs no room, and cannot be put out to make some.
        return needed - found.num_pages <= reachable - found.num_idle

    def _match(self, sequence: Sequence) -> PrefixMatch:
        """The cached pages that a sequence can begin with."""
        chain = self._chain(sequence)
        return PrefixMatch() if chain is None else self._kv.match(chain, sequence.num_reusable)

    def _chain(self, sequence: Sequence) -> PageChain | None:
        """The names of a sequence's pages; None where nobody could ever share them."""
        request = sequence.request
        if sequence.chain is None and (self._config.prefix_caching or len(request.sequences) > 1):
            first = request.sequences[0]
            if first.chain is not None:
                sequence.chain = first.chain.fork(sequence.token_slice, len(request.prompt_ids))
            else:
                sequence.chain = PageChain(
                    sequence.token_slice,
                    self._kv.page_tokens,
                    content=request.content,
                    start=request.adapter_start,
                    scope="" if self._config.prefix_caching else f"request {first.seq_id}",
                )
        return sequence.chain

    def _bring_in(self, sequence: Sequence, plan: StepPlan) -> None:
        """Take pages for the adapters and all known tokens; ``_fits`` has found that there are enough."""
        request = sequence.request
        missing = self._pin_resident(sequence)
        found = self._match(sequence)
        if sequence.chain is not None and found.num_pages:
            sequence.num_computed = self._kv.begin_with(sequence.seq_id, sequence.chain, found)
            self.prefix_hit_tokens += sequence.num_computed
        sequence.num_cached_pages = found.num_pages
        self._page_in(missing, plan)
        has_room = self._pool.make_room(self._kv.missing_pages(sequence.seq_id, sequence.num_tokens))
        assert has_room, "a sequence came in for which there was no room"
        self._kv.extend(sequence.seq_id, sequence.num_tokens)
        self._in_line.discard(sequence)
        sequence.enter(SequenceState.RUNNING)
        sequence.passed = 0
        if sequence.first_scheduled_at is None:
            now = sequence.first_scheduled_at = self._clock()
            sequence.cached_tokens = sequence.num_computed
            if request.first_lookup_at is not None:
                waited = request.waited_for_adapter or missing
                sequence.adapter_load_seconds = now - request.first_lookup_at if waited else 0.0

    def _pin_resident(self, sequence: Sequence) -> list[AdapterPages]:
        """Pin those of the adapters that are in the pool, and return the others."""
        missing: list[AdapterPages] = []
        for image in sequence.request.images:
            if self._adapters.is_resident(image.identity):
                self._adapters.admit(image.identity, image.num_pages)
                self._adapters.pin(image.identity)
            else:
                missing.append(image)
        sequence.pinned = tuple(image.identity for image in sequence.request.images)
        return missing

    def _page_in(self, missing: list[AdapterPages], plan: StepPlan) -> None:
        for image in missing:
            pages = self._adapters.admit(image.identity, image.num_pages)
            assert pages is not None
            self._adapters.pin(image.identity)
            plan.page_ins.append(PageIn(image.identity, image.ref, pages))

    def waiting(self) -> list[Sequence]:
        """Every waiting sequence here; for checks."""
        in_line, deferred = self._in_line, self._deferred
        return [*in_line.first(len(in_line)), *deferred.first(len(deferred)), *self._waits.sequences()]


def max_tokens_in(num_pages: int, kv: KvCache) -> int:
    """Tokens that a sequence can reach in this many pages: the last one sampled needs no room."""
    return num_pages * kv.page_tokens + 1
