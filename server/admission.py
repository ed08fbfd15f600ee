"""Admission: which waiting sequences come in, and when their adapters are fetched.

A waiting sequence is in one of three places. *In line*: ordered by when its first token is due (``Request.due``), which
is by arrival unless clients say what they hope for, and considered a bounded number at a time.
*Loading*: some of its adapters are on their way from disk; it stands aside (see ``adapter_gate.py``), so that it holds
nobody up, and returns to its place. *Deferred*: its adapters are not known to be on the host and enough others load
already, or another mix of adapters waits for a part of its own; it returns when that is done. A preempted sequence gets
back in line at its old place.
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
from loraplex.server.adapter_directory import AdapterDirectory
from loraplex.server.adapter_gate import AdapterGate, AtHand, FailRequest
from loraplex.server.errors import ContextLengthError, InvalidRequestError
from loraplex.server.messages import AdapterRef, Generate
from loraplex.server.page_ins import PageIns
from loraplex.server.request import AdapterPages, Sequence, SequenceState
from loraplex.server.scheduler_config import SchedulerConfig
from loraplex.server.step_plan import StepPlan, cut_chunk

by_arrival = attrgetter("seq_id")
"""Sort key of sequences: ids rise with arrival."""

by_due = attrgetter("request.due", "seq_id")
"""Sort key of those that wait."""


class WaitingLine:
    """Sequences ordered by when they are due: the next ones are read in order, any one can be taken out."""

    def __init__(self) -> None:
        # A sorted list: most arrivals go to its end, and moving even 10^4 pointers costs microseconds.
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=by_due)

    def first(self, count: int) -> list[Sequence]:
        """The earliest ones, as a new list."""
        return self._sequences[:count]

    def discard(self, sequence: Sequence) -> bool:
        """Take a sequence out; False if it is not here."""
        at = bisect_left(self._sequences, by_due(sequence), key=by_due)
        found = at < len(self._sequences) and self._sequences[at] is sequence
        if found:
            del self._sequences[at]
        return found


class Admission:
    """Waiting sequences and the rule by which they come in.

    A sequence comes in when its adapters are in the pool or on the host and the pool has pages for them and for all
    tokens known so far, plus one page to grow unless nothing else runs; what is idle counts as free, and cached pages
    that it can begin with count as its own. It takes the pages at once: taken chunk by chunk, two half-computed prompts
    could wait for each other, and one would be computed twice.

    Attributes:
        gate: finds the adapters.
        prefix_hit_tokens: tokens that sequences did not have to compute, so far.
        blocked: the first in line that found no pages when the line was last gone through.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        kv: KvCache,
        adapters: AdapterCache,
        directory: AdapterDirectory,
        page_ins: PageIns,
        note_arrival: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._page_ins = page_ins
        self._clock = clock
        self._in_line = WaitingLine()
        self._deferred = WaitingLine()
        self._contended = WaitingLine()
        self.gate = AdapterGate(pool, kv, adapters, directory, config.max_loading, note_arrival, clock)
        self.prefix_hit_tokens = 0
        self.blocked: Sequence | None = None

    @property
    def num_in_line(self) -> int:
        """Sequences that nothing keeps from being considered in the next step."""
        return len(self._in_line)

    @property
    def loading(self) -> tuple[AdapterRef, ...]:
        """Adapters that waiting sequences stand aside for."""
        return self.gate.waits.loading

    def next_in_line(self) -> list[Sequence]:
        """Those that are considered in a step."""
        return self._in_line.first(self._config.look_ahead)

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
        """Put a waiting sequence in line at its place."""
        self._in_line.add(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        for queue in (self._in_line, self._deferred, self._contended):
            queue.discard(sequence)
        self.gate.let_go(sequence)

    def poll_adapters(self, fail: FailRequest) -> None:
        """Put those back in line whose adapters are no longer loading."""
        for sequence in self.gate.waits.poll():
            self._in_line.add(sequence)
        if given_up := self.gate.waits.give_up(self._clock()):
            fail(*given_up)
        returning = self._contended.first(self._config.look_ahead)
        if self.gate.has_room:
            returning += self._deferred.first(self._config.look_ahead)
        for sequence in returning:
            self.withdraw(sequence)
            self._in_line.add(sequence)

    def admit(
        self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest, *, idle: bool = True
    ) -> None:
        """Let sequences in, in the order of the line, and plan their first chunks and page-ins.

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
        while idle and len(self._in_line) and not plan.chunks and not self._page_ins:
            self._consider_first(plan, running, budget, fail)

    def _consider_first(self, plan: StepPlan, running: list[Sequence], budget: int, fail: FailRequest) -> None:
        limit = min(self._config.max_running, self._config.max_batch_tokens)
        self.blocked = None
        for sequence in self.next_in_line():
            # A request that has just failed takes its other choices with it.
            if sequence.state is not SequenceState.WAITING or not self._has_adapters(sequence, fail):
                continue
            if budget <= 0 or len(running) >= limit:
                continue
            if self.blocked is not None and self.blocked.passed >= self._config.max_passes:
                continue
            if not self._fits(sequence, alone=not running):
                self.blocked = self.blocked or sequence
                continue
            if self.blocked is not None:
                self.blocked.passed += 1
            self._bring_in(sequence, plan)
            insort(running, sequence, key=by_arrival)
            chunk = cut_chunk(sequence, min(budget, self._config.prefill_chunk))
            plan.chunks.append(chunk)
            budget -= chunk.stop - chunk.start

    def _has_adapters(self, sequence: Sequence, fail: FailRequest) -> bool:
        """Whether the adapters are at hand; if not, the sequence is out of the line now."""
        found = self.gate.check(sequence, fail)
        if found is AtHand.LOADING:
            self._in_line.discard(sequence)
        elif found is AtHand.TOO_MANY:
            self._in_line.discard(sequence)
            self._deferred.add(sequence)
        elif found is AtHand.CONTENDED:
            self._in_line.discard(sequence)
            self._contended.add(sequence)
        return found is AtHand.YES

    def _fits(self, sequence: Sequence, *, alone: bool) -> bool:
        request, adapters = sequence.request, self._adapters
        needed = self._kv.pages_for(sequence.num_tokens) + (0 if alone else 1)
        reachable = self._pool.num_reachable_alone if alone else self._pool.num_reachable
        if request.images:
            resident = [image.identity for image in request.images if adapters.is_resident(image.identity)]
            needed += sum(image.num_pages for image in request.images if image.identity not in resident)
            reachable -= (adapters.num_evictable_alone_of if alone else adapters.num_evictable_of)(resident)
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
                    scope=request.cache_salt if self._config.prefix_caching else f"request {first.seq_id}",
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
        needed = self._kv.missing_pages(sequence.seq_id, sequence.num_tokens)
        has_room = self._pool.make_room(needed + sum(image.num_pages for image in missing), at_any_price=True)
        assert has_room, "a sequence came in for which there was no room"
        for image in missing:
            plan.page_ins.append(self._page_ins.begin(image))
            if sequence.first_scheduled_at is None:
                request.copies[image.identity] = self._page_ins.times(image.identity)
            self._adapters.pin(image.identity)
        self._kv.extend(sequence.seq_id, sequence.num_tokens)
        self._in_line.discard(sequence)
        self.gate.let_go(sequence)
        sequence.enter(SequenceState.RUNNING)
        sequence.passed = 0
        if sequence.first_scheduled_at is None:
            now = sequence.first_scheduled_at = self._clock()
            sequence.cached_tokens = sequence.num_computed
            self.gate.count_lookups(sequence, missing)
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

    def waiting(self) -> list[Sequence]:
        """Every waiting sequence here; for checks."""
        queues = (self._in_line, self._deferred, self._contended)
        standing = [sequence for queue in queues for sequence in queue.first(len(queue))]
        return [*standing, *self.gate.waits.sequences()]
