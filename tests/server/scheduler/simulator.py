"""The scheduler in a simulated engine: what is computed for a token is a hash of all that it depends on, pages hold it,
and the next token is drawn from it. Work on the pages is done in order, and as late as can be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import LruOrder, ValueOrder
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PrefixCache
from loraplex.server.adapter_directory import AdapterFailed, AdapterLoading, AdapterReady, AdapterStatus
from loraplex.server.errors import AdapterInvalidError, LoraplexError
from loraplex.server.messages import (
    AdapterRef,
    Generate,
    RequestFailed,
    RouterChoice,
    TokenLogprob,
    TokenOutput,
)
from loraplex.server.request import NEVER, AdapterPages, SequenceState, choice_seed, invocation_start
from loraplex.server.scheduler import Chunk, PageIn, SampledToken, Scheduler, SchedulerConfig, StepPlan

PAGE_TOKENS = 4
VOCABULARY = 11
EOS = 0
CONFIG = SchedulerConfig(
    max_model_len=60,
    eos_token_ids=frozenset({EOS}),
    max_batch_tokens=12,
    max_running=6,
    max_waiting=30,
    prefill_chunk=7,
    max_passes=3,
    look_ahead=5,
    max_loading=2,
)


@dataclass(frozen=True)
class Adapter:
    """Adapters of the same content are one to the pool."""

    pages: int
    invocation: tuple[int, ...] = ()
    mix_problem: str | None = None
    content: str | None = None


ADAPTERS = {
    "a": Adapter(1),
    "b": Adapter(2),
    "alias of b": Adapter(2, content="b"),
    "c": Adapter(3),
    "d": Adapter(5),
    "e": Adapter(9),
    "huge": Adapter(40),
    "activated": Adapter(2, invocation=(3, 4), mix_problem="cannot"),
    "mixture": Adapter(3, mix_problem="cannot"),
}

Effects = tuple[tuple[str, float], ...]


def ref(name: str, revision: int = 0) -> AdapterRef:
    return AdapterRef(name=name, path=f"/adapters/{name}", revision=revision)


def computed(tokens: list[int], adapters: Effects, start: int) -> list[bytes]:
    """What the model computes for each token: it depends on the tokens before it and on what acts on each of them."""
    state, states = b"", []
    for position, token in enumerate(tokens):
        acting = adapters if position >= start else ()
        state = hashlib.blake2b(repr((state, token, acting)).encode(), digest_size=8).digest()
        states.append(state)
    return states


def next_token(state: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((state, seed)).encode(), digest_size=4).digest()) % VOCABULARY


class LateDirectory:
    """Adapters that load when told to."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = adapters
        self.status: dict[AdapterRef, AdapterStatus] = {}
        self.holds: Counter[AdapterRef] = Counter()
        self.is_full = False

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        assert self.holds[ref], "looked up without a hold"
        return self.status.setdefault(ref, AdapterLoading())

    def is_at_hand(self, ref: AdapterRef) -> bool:
        return isinstance(self.status.get(ref), AdapterReady)

    def hold(self, ref: AdapterRef) -> None:
        self.holds[ref] += 1

    def release_hold(self, ref: AdapterRef) -> None:
        assert self.holds[ref]
        self.holds[ref] -= 1

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        return self.is_full

    @property
    def loading(self) -> list[AdapterRef]:
        return [ref for ref, status in self.status.items() if isinstance(status, AdapterLoading)]

    def identity(self, ref: AdapterRef) -> str:
        return f"content of {self.adapters[ref.name].content or ref.name}"

    def finish(self, ref: AdapterRef) -> None:
        adapter = self.adapters[ref.name]
        self.status[ref] = AdapterReady(self.identity(ref), adapter.pages, adapter.invocation, adapter.mix_problem)

    def pages_of(self, name: str) -> AdapterPages:
        return AdapterPages(self.identity(ref(name)), ref(name), self.adapters[name].pages)

    def fail(self, ref: AdapterRef) -> None:
        self.status[ref] = AdapterFailed(AdapterInvalidError("broken"))

    def forget_unheld(self) -> None:
        for ref in [ref for ref in self.status if not self.holds[ref]]:
            del self.status[ref]


Results = tuple[dict[int, SampledToken], dict[int, list[TokenLogprob]], dict[int, list[RouterChoice]]]


@dataclass(frozen=True)
class Row:
    """A chunk as the device is told of it at its launch; the token that it awaits is missing."""

    chunk: Chunk
    tokens: list[int]
    pages: list[int]
    adapter_pages: dict[str, list[int]]


@dataclass
class Launched:
    """A step that waits to be done. ``given_up`` are sequences preempted since."""

    plan: StepPlan
    rows: list[Row]
    given_up: set[int] = field(default_factory=set)


class Device:
    """Pages with content, a queue of work on them, and the last token that was sampled for each sequence."""

    def __init__(self, directory: LateDirectory) -> None:
        self.directory = directory
        self.content: dict[int, list[object]] = {}
        self.queue: list[Launched | list[int] | tuple[PageIn, ...]] = []
        self.arrived: list[str] = []
        self.sampled: dict[int, tuple[int, int]] = {}

    def poison(self, pages: list[int]) -> None:
        self.queue.append(list(pages))

    def run_until(self, launched: Launched) -> Results:
        while True:
            work = self.queue.pop(0)
            if work is launched:
                return self._run(launched)
            self._do(work)

    def run_rest(self) -> None:
        """Do what no step in flight is behind."""
        while self.queue and not isinstance(self.queue[0], Launched):
            self._do(self.queue.pop(0))

    def _do(self, work: Launched | list[int] | tuple[PageIn, ...]) -> None:
        assert not isinstance(work, Launched), "steps are taken out of their order"
        if isinstance(work, tuple):
            self._page_in(work)
            return
        for page in work:
            self.content[page] = [float("nan")] * PAGE_TOKENS

    def _page_in(self, page_ins: Iterable[PageIn]) -> None:
        for page_in in page_ins:
            assert self.directory.holds[page_in.ref], "the image may be gone"
            for at, page in enumerate(page_in.pages):
                self.content[page] = [(page_in.identity, at)]
            self.arrived.append(page_in.identity)

    def give_up_steps(self) -> None:
        self.queue = [work for work in self.queue if isinstance(work, list)]
        self.arrived = []

    def _run(self, launched: Launched) -> Results:
        self._page_in(launched.plan.page_ins)
        states = [self._states(row) for row in launched.rows]
        for row, found in zip(launched.rows, states, strict=True):
            for position in range(row.chunk.start, row.chunk.stop):
                self.content[row.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] = found[position]
        for row, found in zip(launched.rows, states, strict=True):
            self._check_what_is_read(row, found)
        results: Results = ({}, {}, {})
        for row, found in zip(launched.rows, states, strict=True):
            chunk, seq_id = row.chunk, row.chunk.sequence.seq_id
            if chunk.samples:
                token = next_token(found[-1], chunk.sequence.seed)
                self.sampled[seq_id] = chunk.stop, token
                results[0][seq_id] = SampledToken(token)
            if chunk.wants_prompt_logprobs:
                results[1][seq_id] = _prompt_logprobs(chunk)
            if chunk.wants_routing:
                results[2][seq_id] = _routes(chunk)
        return results

    def _states(self, row: Row) -> list[bytes]:
        chunk, tokens = row.chunk, list(row.tokens)
        if chunk.awaits_token:
            position, token = self.sampled[chunk.sequence.seq_id]
            assert position == chunk.start == chunk.stop - 1 == len(tokens)
            tokens.append(token)
        assert len(tokens) == chunk.stop
        return computed(tokens, chunk.adapters, chunk.adapter_start)

    def _check_what_is_read(self, row: Row, states: list[bytes]) -> None:
        for position, state in enumerate(states):
            assert self.content[row.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] == state
        for identity, pages in row.adapter_pages.items():
            for at, page in enumerate(pages):
                assert self.content[page] == [(identity, at)]


class Engine:
    """A scheduler, a pool whose pages have content, and a device that checks all it reads.

    Args:
        num_pages: of the pool.
        adapters: by name.
        config: limits.
        ahead: whether ``step`` plans the next step before the last one is done.
        by_value: whether what is idle goes by its worth, which changes with what it takes to make it again.
    """

    def __init__(
        self,
        num_pages: int,
        adapters: Mapping[str, Adapter] = ADAPTERS,
        config: SchedulerConfig = CONFIG,
        *,
        ahead: bool = False,
        by_value: bool = False,
    ) -> None:
        self.config = config
        self.ahead = ahead
        self.now = 0.0
        self.directory = LateDirectory(adapters)
        self.device = Device(self.directory)
        clock = lambda: self.now  # noqa: E731
        rates = ArrivalRates(5.0, clock=clock) if by_value else None
        order = ValueOrder() if by_value else LruOrder()
        self.pool = PagePool(num_pages, on_release=self.device.poison, order=order)
        self.kv = KvCache(self.pool, PAGE_TOKENS, PrefixCache(self.pool, rates, lambda: 1.0 + self.now % 7))
        self.adapters = AdapterCache(self.pool, rates)
        self.scheduler = Scheduler(
            config, self.pool, self.kv, self.adapters, self.directory, clock, rates.note if rates else None
        )
        self.device.poison(list(range(num_pages)))
        self.in_flight: list[Launched] = []
        self.may_plan = True
        self.counts: Counter[str] = Counter()
        self.accepted: dict[str, Generate] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = {}
        self.failures: dict[str, RequestFailed] = {}

    def add(self, generate: Generate) -> bool:
        try:
            self.scheduler.add(generate)
        except LoraplexError:
            return False
        self.accepted[generate.request_id] = generate
        return True

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.scheduler.abort(request_id, index)
        indices = range(self.accepted[request_id].n) if index is None else [index]
        self.aborted |= {(request_id, i) for i in indices if not self.has_ended(request_id, i)}

    def has_ended(self, request_id: str, index: int) -> bool:
        key = request_id, index
        if request_id in self.failures or key in self.aborted:
            return True
        return any(output.finish_reason for output in self.outputs.get(key, []))

    @property
    def open_choices(self) -> list[tuple[str, int]]:
        choices = [(name, index) for name, generate in self.accepted.items() for index in range(generate.n)]
        return [choice for choice in choices if not self.has_ended(*choice)]

    def note_failures(self, failed: list[RequestFailed]) -> None:
        for message in failed:
            open_before = [index for name, index in self.open_choices if name == message.request_id]
            assert open_before, "a failure of a request that had ended"
            self.failures[message.request_id] = message

    @property
    def can_plan(self) -> bool:
        """Whether a step may be planned before any is completed."""
        return not self.in_flight or (
            self.ahead and self.may_plan and len(self.in_flight) == 1 and not self.in_flight[0].plan.needs_completion
        )

    def plan(self) -> StepPlan:
        assert self.can_plan
        self.now += 0.1
        self.device.run_rest()
        self._note_arrivals()
        plan = self.scheduler.schedule()
        self.note_failures(plan.failed)
        if not self.in_flight:
            waits = bool(self.scheduler.page_ins) or not self.scheduler.has_work
            assert plan.chunks or waits or not self.scheduler.num_running
            assert plan.chunks or waits or self.scheduler.waiting_adapters
        for launched in self.in_flight:
            launched.given_up |= {
                row.chunk.sequence.seq_id for row in launched.rows if row.chunk.sequence.state is SequenceState.WAITING
            }
            self.counts["preempted in flight"] += len(launched.given_up)
            self.counts["ahead"] += bool(plan.chunks)
            self.may_plan = False
        if plan.chunks:
            launched = Launched(plan, [self._row(chunk) for chunk in plan.chunks])
            self.in_flight.append(launched)
            self.device.queue.append(launched)
        elif plan.page_ins:
            self.device.queue.append(tuple(plan.page_ins))
        assert plan.num_tokens <= self.config.max_batch_tokens
        assert all(0 < chunk.stop - chunk.start <= self.config.prefill_chunk for chunk in plan.chunks)
        return plan

    def _note_arrivals(self) -> None:
        arrived, self.device.arrived = self.device.arrived, []
        for identity in arrived:
            self.scheduler.page_ins.end(identity)

    def _row(self, chunk: Chunk) -> Row:
        sequence = chunk.sequence
        if chunk.samples:
            assert chunk.stop < sequence.request.max_total_tokens, "a token too many"
            assert not (sequence.needs_history and sequence.num_pending), "sampled without its history"
        assert chunk.awaits_token == (chunk.stop > len(sequence.prompt_ids) + len(sequence.output_ids))
        return Row(
            chunk,
            sequence.token_slice(0, chunk.stop),
            list(self.kv.pages(sequence.seq_id)),
            {identity: list(self.adapters.pages(identity)) for identity, _ in chunk.adapters},
        )

    def finish(self, plan: StepPlan) -> None:
        if not plan.chunks:
            assert self.scheduler.complete(plan, {}) == []
            return
        launched = self.in_flight.pop(0)
        assert launched.plan is plan
        self.may_plan = True
        results, prompt_logprobs, routing = self.device.run_until(launched)
        self.counts["wasted"] += sum(
            chunk.samples and chunk.sequence.state is SequenceState.FINISHED for chunk in plan.chunks
        )
        for output in self.scheduler.complete(plan, results, prompt_logprobs, routing):
            key = output.request_id, output.index
            assert not self.has_ended(*key), "an output of a choice that had ended"
            self.outputs.setdefault(key, []).append(output)
        self.scheduler.check_integrity()

    def step(self) -> StepPlan:
        """Plan a step. It is finished, or the one before it where this engine runs ahead."""
        while not self.can_plan:
            self.finish_first()
        before = list(self.in_flight)
        plan = self.plan()
        for launched in before:
            self.finish(launched.plan)
        if not self.ahead:
            self.finish(plan)
        return plan

    def finish_first(self) -> None:
        self.finish(self.in_flight[0].plan)

    def fail_steps(self, error: LoraplexError) -> None:
        """The steps in flight come to nothing."""
        self.device.give_up_steps()
        self.in_flight.clear()
        self.may_plan = True
        self.note_failures(self.scheduler.fail_all(error))

    def check_in_flight(self) -> None:
        """What steps in flight use is kept, unless a sequence was preempted: its pages go to later steps."""
        for launched in self.in_flight:
            for row in launched.rows:
                sequence = row.chunk.sequence
                if sequence.seq_id in launched.given_up:
                    continue
                assert len(self.kv.pages(sequence.seq_id)) >= len(row.pages)
                assert set(row.adapter_pages) <= set(sequence.pinned)
                assert all(self.adapters.pages(name) == pages for name, pages in row.adapter_pages.items())

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            for ref in self.directory.loading:
                self.directory.finish(ref)
            if not self.scheduler.has_work and not self.in_flight:
                break
            self.step()
        assert not self.scheduler.has_work, "no progress"
        self.device.run_rest()
        self._note_arrivals()

    def check_that_all_is_over(self) -> None:
        assert self.open_choices == []
        for (name, index), outputs in self.outputs.items():
            assert sum(output.finish_reason is not None for output in outputs) <= 1
            if (name, index) not in self.aborted and name not in self.failures:
                self._check_choice(self.accepted[name], index, outputs)
        for name in self.directory.adapters:
            self.scheduler.prefetcher.unkeep(self.directory.identity(ref(name)))
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.kv.num_pages == 0
        assert self.adapters.num_evictable_pages == self.adapters.num_pages
        assert self.config.prefix_caching or not self.kv.prefixes.num_pages
        assert self.directory.holds.total() == 0
        assert self.pool.make_room(self.pool.num_pages)
        assert self.kv.prefixes.num_pages == self.adapters.num_pages == 0
        self.pool.check_integrity()

    def _check_choice(self, generate: Generate, index: int, outputs: list[TokenOutput]) -> None:
        tokens, reason = self.expected(generate, index)
        assert [token for output in outputs for token in output.token_ids] == tokens
        assert outputs[-1].finish_reason == reason
        assert [output.queue_seconds is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)
        wanted = index == 0 and generate.params.prompt_logprobs is not None
        prompt = [None, *(TokenLogprob(token_id=token, logprob=-1.0) for token in generate.prompt_ids[1:])]
        assert outputs[0].prompt_logprobs == (prompt if wanted else None)
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        self._check_routing(generate, index, outputs, len(tokens))

    def _check_routing(self, generate: Generate, index: int, outputs: list[TokenOutput], num_sampled: int) -> None:
        """Every computed token that an adapter acts on is told once, with the output that follows it."""
        if not generate.return_routing:
            assert all(output.routing is None for output in outputs)
            return
        adapters, told = self.acting(generate)
        stop = len(generate.prompt_ids)
        if index:
            told = max(told, stop)
        for output in outputs:
            found = [expert for choice in output.routing or () for (expert,) in choice.experts]
            assert sorted(found) == sorted(list(range(told, stop)) * len(adapters))
            told = max(told, stop)
            stop += 1

    def acting(self, generate: Generate) -> tuple[Effects, int]:
        """Identities and weights that act on a request, and from where on."""
        if generate.adapter is not None:
            start = invocation_start(generate.prompt_ids, self.directory.adapters[generate.adapter.name].invocation)
            return ((self.directory.identity(generate.adapter), 1.0),), start
        weights: dict[AdapterRef, float] = {}
        for part in generate.mix:
            weights[part.adapter] = weights.get(part.adapter, 0.0) + part.weight
        by_identity: dict[str, float] = {}
        for part, weight in weights.items():
            identity = self.directory.identity(part)
            by_identity[identity] = by_identity.get(identity, 0.0) + weight
        return tuple(sorted(by_identity.items())), 0

    def expected(self, generate: Generate, index: int) -> tuple[list[int], str]:
        """What the choice gives when nothing else is in the world."""
        params = generate.params
        adapters, start = self.acting(generate)
        refs = [generate.adapter] if generate.adapter else [part.adapter for part in generate.mix]
        sizes = {self.directory.identity(ref): self.directory.adapters[ref.name].pages for ref in refs}
        beside = self.pool.num_pages - (0 if start == NEVER else sum(sizes.values()))
        limit = min(self.config.max_model_len, beside * PAGE_TOKENS + 1, len(generate.prompt_ids) + params.max_tokens)
        assert params.seed is not None
        seed = choice_seed(params.seed, index)
        tokens = list(generate.prompt_ids)
        while len(tokens) < limit:
            tokens.append(next_token(computed(tokens, adapters, start)[-1], seed))
            sampled = len(tokens) - len(generate.prompt_ids)
            if tokens[-1] == EOS and not params.ignore_eos and sampled >= params.min_tokens:
                return tokens[len(generate.prompt_ids) :], "stop"
        return tokens[len(generate.prompt_ids) :], "length"


def _prompt_logprobs(chunk: Chunk) -> list[TokenLogprob]:
    prompt = chunk.sequence.prompt_ids
    return [TokenLogprob(token_id=token, logprob=-1.0) for token in prompt[chunk.start + 1 : chunk.stop + 1]]


def _routes(chunk: Chunk) -> list[RouterChoice]:
    """For each adapter one router, which sends the token at position p to expert p."""
    positions = range(max(chunk.start, chunk.adapter_start), chunk.stop)
    return [
        RouterChoice(
            adapter=identity,
            layer=0,
            site="mlp",
            start=positions.start,
            experts=[[position] for position in positions],
            weights=[[1.0] for _ in positions],
        )
        for identity, _ in chunk.adapters
        if positions
    ]
