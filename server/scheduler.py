"""The scheduler: who runs in the next step, with which tokens, and what their results mean.

It decides and touches no tensor. A step is ``schedule`` (which gives a ``StepPlan``), the model's work, and
``complete``. Running sequences with one token to compute come first, so prompts never hold up decoding; what is left of
the step's token budget goes to prompts under way, by arrival, then to sequences from the line, by when their first
token is due (see ``admission.py``).

The next step can be planned while one is in flight. Its chunks count as computed then, and where it samples, its
sequence has one token whose id is *pending* until ``complete``. A sequence whose end depends on that token alone is
planned a token too many, whose result is ignored. Work on the device is done in the order of the plans: pages that a
sequence gives up by preemption may be another's in the next step. Those of sequences that have ended, and the pins of
their adapters, are kept until no step that has been planned uses them.

When a running sequence needs a page and neither a free nor an idle one is left, the running sequence that
arrived last is preempted: it gives up its pages and computes its tokens again when it comes back in. So whoever arrived
first always gets on, and since its ``max_total_tokens`` fit the pool, it ends.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.integrity import check_pool
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.adapter_directory import (
    AdapterDirectory,
    AdapterFailed,
    AdapterLoading,
    AdapterReady,
    AdapterStatus,
)
from loraplex.server.adapter_gate import max_tokens_in
from loraplex.server.admission import Admission, by_arrival
from loraplex.server.errors import LoraplexError, OverloadedError
from loraplex.server.messages import (
    AdapterRef,
    AdapterTier,
    Generate,
    RequestFailed,
    RouterChoice,
    TokenLogprob,
    TokenOutput,
)
from loraplex.server.page_ins import PageIns
from loraplex.server.prefetch import Prefetcher
from loraplex.server.request import Request, Sequence, SequenceState, make_request
from loraplex.server.scheduler_checks import check_ownership
from loraplex.server.scheduler_config import SchedulerConfig
from loraplex.server.step_output import collect_prompt_logprobs, collect_routing, make_output, request_failed
from loraplex.server.step_plan import Chunk, PageIn, SampledToken, StepPlan, cut_chunk

__all__ = [
    "AdapterDirectory",
    "AdapterFailed",
    "AdapterLoading",
    "AdapterReady",
    "AdapterStatus",
    "Chunk",
    "PageIn",
    "SampledToken",
    "Scheduler",
    "SchedulerConfig",
    "StepPlan",
]


class Scheduler:
    """Continuous batching over one pool.

    Args:
        config: limits.
        pool: shared by ``kv`` and ``adapters``, and by nobody else.
        kv: page lists by sequence id.
        adapters: which adapters lie in the pool.
        directory: the host store of adapters.
        note_arrival: is told of each request's adapters, by identity.
        clock: monotonic seconds.

    Attributes:
        preemptions: sequences preempted so far.
        page_ins: copies into the pool that have been planned; the caller says when one is over.
        prefetcher: plans those that no sequence of the step needs.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        kv: KvCache,
        adapters: AdapterCache,
        directory: AdapterDirectory,
        clock: Callable[[], float] = time.monotonic,
        note_arrival: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._clock = clock
        self.page_ins = PageIns(adapters, directory, clock)
        self.prefetcher = Prefetcher(config.max_prefetches, pool, adapters, directory, self.page_ins)
        self._admission = Admission(config, pool, kv, adapters, directory, self.page_ins, note_arrival, clock)
        self._requests: dict[str, Request] = {}
        self._running: list[Sequence] = []
        self._open_under: Counter[AdapterRef] = Counter()
        self._num_live = 0
        self._next_seq_id = 0
        self._in_flight: list[StepPlan] = []
        self._planned = StepPlan()
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, for whatever reason."""
        return self._num_live - len(self._running)

    @property
    def num_ready(self) -> int:
        """Waiting sequences that do not wait for an adapter to be read."""
        return self._admission.num_in_line

    @property
    def waiting_adapters(self) -> tuple[AdapterRef, ...]:
        """Adapters that are loading while sequences wait for them."""
        return self._admission.loading

    def num_open_under(self, ref: AdapterRef) -> int:
        """Open requests under a registration of an adapter, alone or in a mix."""
        return self._open_under[ref]

    @property
    def lookups(self) -> Counter[tuple[AdapterTier, str]]:
        """How often adapters of sequences that came in were found in a tier, or not: see ``AdapterGate``."""
        return self._admission.gate.lookups

    @property
    def prefix_hit_tokens(self) -> int:
        """Tokens that sequences found computed when they came in, so far."""
        return self._admission.prefix_hit_tokens

    def add(self, generate: Generate) -> None:
        """Queue a request.

        Raises:
            ContextLengthError: the prompt can never fit the model's context or the pool.
            InvalidRequestError: the prompt is empty.
            OverloadedError: the queue is full.
        """
        assert generate.request_id not in self._requests, f"request {generate.request_id} is open already"
        assert generate.n >= 1
        self._admission.check_prompt(generate)
        if self.num_waiting >= self._config.max_waiting:
            raise OverloadedError(
                f"{self.num_waiting} sequences are waiting, and the limit is {self._config.max_waiting}."
            )
        total = min(len(generate.prompt_ids) + generate.params.max_tokens, self._config.max_model_len)
        request = make_request(
            generate,
            first_seq_id=self._next_seq_id,
            arrival=self._clock(),
            max_total_tokens=min(total, max_tokens_in(self._pool.num_pages, self._kv)),
            eos_token_ids=self._config.eos_token_ids,
        )
        self._next_seq_id += generate.n
        self._num_live += generate.n
        self._requests[request.request_id] = request
        self._open_under.update(request.weights.keys())
        self._admission.submit(request.sequences[0])

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one choice of it, without a word. Unknown and finished ones are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for sequence in request.sequences:
            if index in (None, sequence.index) and sequence.state is not SequenceState.FINISHED:
                self._end(sequence)

    def fail(self, request_id: str, error: LoraplexError) -> RequestFailed | None:
        """End a request with an error. Returns what its client is to be told; None if it is not open."""
        if (request := self._requests.get(request_id)) is None:
            return None
        self.abort(request_id)
        return request_failed(request, error, self._clock())

    def fail_all(self, error: LoraplexError) -> list[RequestFailed]:
        """End every request with an error and give up the steps in flight.

        Adapters that were being paged in are dropped: their pages may hold anything.
        """
        ended, self._in_flight = self._ended, []
        for sequence in ended:
            self._give_up_pages(sequence)
        # A plan that was not finished has its word to say, too.
        told, self._planned = self._planned.failed, StepPlan()
        failed = [*told, *(self.fail(request_id, error) for request_id in list(self._requests))]
        self.page_ins.give_up()
        return [message for message in failed if message is not None]

    def schedule(self) -> StepPlan:
        """Plan a step. Its page-ins are due in any case; one with chunks must be given to ``complete`` in its turn.

        The last one may be in flight meanwhile, unless it ``needs_completion``; it is completed before the next call.
        """
        assert len(self._in_flight) <= 1, "the step before the last one has not been completed"
        for last in self._in_flight:
            last.anticipate()
        plan = self._planned = StepPlan()
        preemptions = self.preemptions
        self._plan_decodes(plan)
        budget = self._plan_prefills(plan, self._config.max_batch_tokens - len(plan.chunks))
        # Who has just been preempted would otherwise come straight back, or others take the pages it gave up.
        may_enter = self.preemptions == preemptions
        fail = partial(self._fail_planned, plan)
        self._admission.poll_adapters(fail)
        self._admission.admit(plan, self._running, budget if may_enter else 0, fail, idle=not self._in_flight)
        is_full = not may_enter or self._admission.blocked is not None
        self.prefetcher.plan(plan, [] if is_full else self._admission.next_in_line(), reserve=len(self._running))
        self._planned = StepPlan()
        if plan.chunks:
            self._in_flight.append(plan)
        return plan

    def _fail_planned(self, plan: StepPlan, request: Request, error: LoraplexError) -> None:
        failed = self.fail(request.request_id, error)
        assert failed is not None
        plan.failed.append(failed)

    def _plan_decodes(self, plan: StepPlan) -> None:
        # By position: preemption shortens the list from its end, where nobody has been planned yet.
        position = 0
        page_tokens = self._kv.page_tokens
        while position < len(self._running):
            sequence = self._running[position]
            position += 1
            computed = sequence.num_computed
            if computed != sequence.num_tokens - 1 or (sequence.num_pending and sequence.ends_with_pending):
                continue
            # A token that does not begin a page lies in one that is there.
            if computed % page_tokens or self._secure_pages(sequence):
                plan.chunks.append(cut_chunk(sequence, 1))

    def _secure_pages(self, sequence: Sequence) -> bool:
        """Find room for all tokens of a running sequence; False where it had to give way itself, or has to wait."""
        missing = self._kv.missing_pages(sequence.seq_id, sequence.num_tokens)
        if not missing:
            return True
        while not self._pool.make_room(missing):
            if any(self._kv.pages(ended.seq_id) or ended.pinned for ended in self._ended):
                return False  # the step in flight gives them back
            if len(self._running) == 1:
                # What is on its way into the pool can be put out once it is there.
                if not self._pool.make_room(missing, at_any_price=True):
                    assert self.page_ins, "a sequence that runs alone always fits"
                    return False
                break
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self._kv.extend(sequence.seq_id, sequence.num_tokens)
        return True

    def _plan_prefills(self, plan: StepPlan, budget: int) -> int:
        """Returns the tokens left."""
        if len(plan.chunks) == len(self._running):
            return budget
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.is_prefilling:
                chunk = cut_chunk(sequence, min(budget, self._config.prefill_chunk))
                plan.chunks.append(chunk)
                budget -= chunk.stop - chunk.start
        return budget

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self._running) > 1, "a sequence that runs alone always fits"
        self._stop_running(sequence)
        self._give_up_pages(sequence)
        sequence.enter(SequenceState.WAITING)
        sequence.num_computed = 0
        sequence.preempted_at.append(self._clock())
        self._admission.submit(sequence)
        self.preemptions += 1

    def complete(
        self,
        plan: StepPlan,
        results: Mapping[int, SampledToken],
        prompt_logprobs: Mapping[int, list[TokenLogprob]] | None = None,
        routing: Mapping[int, list[RouterChoice]] | None = None,
    ) -> list[TokenOutput]:
        """Take in the results of a step. Those of sequences that ended meanwhile are ignored.

        Args:
            plan: the earliest one in flight.
            results: by sequence id, one for each chunk that samples.
            prompt_logprobs: by sequence id, for each chunk that wants them (see ``Chunk`` for which).
            routing: by sequence id, what routers chose for the tokens of chunks that want to know; none where there are
                no routers.

        Returns:
            One output for each sequence that has something to say.
        """
        if not plan.chunks:
            return []
        assert self._in_flight, "a plan that is not under way"
        assert plan is self._in_flight[0], "a plan that is not the first one under way"
        del self._in_flight[0]
        for sequence in plan.ended:
            self._give_up_pages(sequence)
        outputs: list[TokenOutput] = []
        page_tokens, running, finished = self._kv.page_tokens, SequenceState.RUNNING, SequenceState.FINISHED
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.state is finished:
                continue
            if chunk.wants_prompt_logprobs:
                collect_prompt_logprobs(sequence, (prompt_logprobs or {})[sequence.seq_id], chunk)
            if chunk.wants_routing:
                collect_routing(sequence, (routing or {}).get(sequence.seq_id, ()), chunk.stop)
            # One that was preempted while the step was in flight keeps what it has to say, but not its pages.
            if sequence.state is running:
                sequence.num_computed = chunk.stop
                if chunk.stop // page_tokens > sequence.num_cached_pages:
                    self._cache_pages(sequence)
            if chunk.samples or chunk.stop == sequence.num_tokens:
                outputs.append(self._take_result(sequence, results[sequence.seq_id] if chunk.samples else None))
        return outputs

    def _cache_pages(self, sequence: Sequence) -> None:
        """Let others begin with the pages that this sequence has filled, now that the step has succeeded."""
        stop = sequence.num_computed // self._kv.page_tokens
        if sequence.chain is not None:
            self._kv.cache(sequence.seq_id, sequence.chain, sequence.num_cached_pages, stop)
        sequence.num_cached_pages = stop

    def _take_result(self, sequence: Sequence, result: SampledToken | None) -> TokenOutput:
        """Add the sampled token, if any, to a sequence whose known tokens are all computed, and tell its client."""
        if not sequence.has_output:
            self._let_siblings_go(sequence)
        if result is not None:
            sequence.append(result.token_id)
        reason = sequence.finish_reason()
        if reason is not None:
            self._end(sequence)
        return make_output(sequence, result, reason, self._clock)

    def _end(self, sequence: Sequence) -> None:
        """Finish a sequence, whatever it was doing."""
        request = sequence.request
        if sequence.state is SequenceState.RUNNING:
            self._stop_running(sequence)
        elif sequence in request.held_back:
            request.held_back.remove(sequence)
        else:
            self._admission.withdraw(sequence)
        sequence.enter(SequenceState.FINISHED)
        self._num_live -= 1
        request.num_live -= 1
        if request.num_live == 0:
            self._close(request)
        self._let_siblings_go(sequence)
        # The steps in flight still write and read this sequence's pages, and may still page its adapter in.
        if self._in_flight:
            self._in_flight[-1].ended.append(sequence)
        else:
            self._give_up_pages(sequence)

    def _close(self, request: Request) -> None:
        del self._requests[request.request_id]
        for ref in request.weights:
            self._open_under[ref] -= 1
            if not self._open_under[ref]:
                del self._open_under[ref]

    @property
    def _ended(self) -> list[Sequence]:
        return [sequence for plan in self._in_flight for sequence in plan.ended]

    def _give_up_pages(self, sequence: Sequence) -> None:
        self._kv.release(sequence.seq_id, keep=self._config.prefix_caching)
        for identity in sequence.pinned:
            self._adapters.unpin(identity)
        sequence.pinned = ()

    def _stop_running(self, sequence: Sequence) -> None:
        at = bisect_left(self._running, sequence.seq_id, key=by_arrival)
        assert self._running[at] is sequence
        del self._running[at]

    def _let_siblings_go(self, sequence: Sequence) -> None:
        """Choice 0 has its prompt computed, or never will: the others wait for it no longer."""
        if sequence.index == 0 and sequence.request.held_back:
            for sibling in sequence.request.held_back:
                self._admission.submit(sibling)
            sequence.request.held_back.clear()

    def check_integrity(self) -> None:
        """AssertionError where the owners of pages, the states of the sequences and the counts here disagree."""
        check_pool(self._pool, self._kv, self._adapters)
        assert self._running == sorted(self._running, key=by_arrival)
        live = [sequence for request in self._requests.values() for sequence in request.sequences]
        live = [sequence for sequence in live if sequence.state is not SequenceState.FINISHED]
        assert len(live) == self._num_live
        assert self._open_under == Counter(ref for request in self._requests.values() for ref in request.weights)
        running = [sequence for sequence in live if sequence.state is SequenceState.RUNNING]
        assert running == sorted(running, key=by_arrival) == self._running
        held_back = [sequence for request in self._requests.values() for sequence in request.held_back]
        waiting = sorted([*self._admission.waiting(), *held_back], key=by_arrival)
        assert waiting == sorted(set(live) - set(running), key=by_arrival)
        check_ownership(self._kv, self._adapters, self.page_ins, running, self._ended, waiting)
