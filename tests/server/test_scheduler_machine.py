"""The scheduler in a simulated engine: pages have content, and the next token is a hash of everything before it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.errors import AdapterInvalidError, EngineError, LoraplexError, OverloadedError
from loraplex.server.messages import (
    AdapterRef,
    Generate,
    RequestFailed,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from loraplex.server.request import choice_seed
from loraplex.server.scheduler import (
    AdapterFailed,
    AdapterLoading,
    AdapterReady,
    AdapterStatus,
    Chunk,
    SampledToken,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)

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


def next_token(identity: str | None, seed: int, tokens: list[int]) -> int:
    digest = hashlib.blake2b(repr((identity, seed, tokens)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % VOCABULARY


class LateDirectory:
    """Adapters of given sizes that load when told to."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.status: dict[AdapterRef, AdapterStatus] = {}
        self.holds: Counter[AdapterRef] = Counter()

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        assert self.holds[ref], "looked up without a hold"
        return self.status.setdefault(ref, AdapterLoading())

    def hold(self, ref: AdapterRef) -> None:
        self.holds[ref] += 1

    def release_hold(self, ref: AdapterRef) -> None:
        assert self.holds[ref]
        self.holds[ref] -= 1

    @property
    def loading(self) -> list[AdapterRef]:
        return [ref for ref, status in self.status.items() if isinstance(status, AdapterLoading)]

    def finish(self, ref: AdapterRef) -> None:
        self.status[ref] = AdapterReady(identity_of(ref), self.sizes[ref.name])

    def fail(self, ref: AdapterRef) -> None:
        self.status[ref] = AdapterFailed(AdapterInvalidError("broken"))

    def forget_unheld(self) -> None:
        for ref in [ref for ref in self.status if not self.holds[ref]]:
            del self.status[ref]


def identity_of(ref: AdapterRef) -> str:
    return f"content of {ref.name}"


class Engine:
    """A scheduler, a pool whose pages have content, and a runner that checks all it reads."""

    def __init__(self, num_pages: int, sizes: Mapping[str, int], config: SchedulerConfig = CONFIG) -> None:
        self.config = config
        self.pool = PagePool(num_pages, on_release=self._poison)
        self.content: dict[int, list[object]] = {}
        self.kv = KvCache(self.pool, PAGE_TOKENS)
        self.adapters = AdapterCache(self.pool)
        self.directory = LateDirectory(sizes)
        self.scheduler = Scheduler(config, self.pool, self.kv, self.adapters, self.directory)
        self._poison(list(range(num_pages)))
        self.accepted: dict[str, Generate] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = {}
        self.failures: dict[str, RequestFailed] = {}

    def _poison(self, pages: list[int]) -> None:
        for page in pages:
            self.content[page] = [float("nan")] * PAGE_TOKENS

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

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.note_failures(plan.failed)
        assert plan.chunks or not self.scheduler.num_running
        assert plan.chunks or not self.scheduler.has_work or self.scheduler.waiting_adapters
        assert plan.num_tokens <= self.config.max_batch_tokens
        assert all(0 < chunk.stop - chunk.start <= self.config.prefill_chunk for chunk in plan.chunks)
        return plan

    def finish(self, plan: StepPlan) -> None:
        results, prompt_logprobs = self._run(plan)
        for output in self.scheduler.complete(plan, results, prompt_logprobs):
            key = output.request_id, output.index
            assert not self.has_ended(*key), "an output of a choice that had ended"
            self.outputs.setdefault(key, []).append(output)
        self.scheduler.check_integrity()

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish(plan)
        return plan

    def _run(self, plan: StepPlan) -> tuple[dict[int, SampledToken], dict[int, list[TokenLogprob]]]:
        for page_in in plan.page_ins:
            assert self.directory.holds[page_in.ref], "the image may be gone"
            for at, page in enumerate(page_in.pages):
                self.content[page] = [(page_in.identity, at)]
        for chunk in plan.chunks:
            for position, cell in self._cells(chunk, chunk.start):
                page = self.kv.pages(chunk.sequence.seq_id)[position // PAGE_TOKENS]
                self.content[page][position % PAGE_TOKENS] = cell
        for chunk in plan.chunks:
            self._check_what_is_read(chunk)
        results = {
            chunk.sequence.seq_id: SampledToken(
                next_token(chunk.adapter, chunk.sequence.seed, chunk.sequence.token_slice(0, chunk.stop))
            )
            for chunk in plan.chunks
            if chunk.samples
        }
        logprobs = {c.sequence.seq_id: _prompt_logprobs(c) for c in plan.chunks if c.wants_prompt_logprobs}
        return results, logprobs

    def _cells(self, chunk: Chunk, start: int) -> list[tuple[int, object]]:
        tokens = chunk.sequence.token_slice(start, chunk.stop)
        return [(start + i, (chunk.adapter, start + i, token)) for i, token in enumerate(tokens)]

    def _check_what_is_read(self, chunk: Chunk) -> None:
        pages = self.kv.pages(chunk.sequence.seq_id)
        for position, cell in self._cells(chunk, 0):
            assert self.content[pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] == cell
        if chunk.adapter is not None:
            for at, page in enumerate(self.adapters.pages(chunk.adapter)):
                assert self.content[page] == [(chunk.adapter, at)]

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            for ref in self.directory.loading:
                self.directory.finish(ref)
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "no progress"

    def check_that_all_is_over(self) -> None:
        assert self.open_choices == []
        for (name, index), outputs in self.outputs.items():
            assert sum(output.finish_reason is not None for output in outputs) <= 1
            if (name, index) not in self.aborted and name not in self.failures:
                self._check_choice(self.accepted[name], index, outputs)
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.kv.num_pages == 0
        assert self.adapters.num_evictable_pages == self.adapters.num_pages
        assert self.directory.holds.total() == 0
        assert self.adapters.make_room(self.pool.num_pages)
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

    def expected(self, generate: Generate, index: int) -> tuple[list[int], str]:
        """What the choice gives when nothing else is in the world."""
        ref, params = generate.adapter, generate.params
        beside = self.pool.num_pages - (self.directory.sizes[ref.name] if ref else 0)
        limit = min(self.config.max_model_len, beside * PAGE_TOKENS + 1, len(generate.prompt_ids) + params.max_tokens)
        assert params.seed is not None
        seed = choice_seed(params.seed, index)
        tokens = list(generate.prompt_ids)
        while len(tokens) < limit:
            tokens.append(next_token(identity_of(ref) if ref else None, seed, tokens))
            sampled = len(tokens) - len(generate.prompt_ids)
            if tokens[-1] == EOS and not params.ignore_eos and sampled >= params.min_tokens:
                return tokens[len(generate.prompt_ids) :], "stop"
        return tokens[len(generate.prompt_ids) :], "length"


def _prompt_logprobs(chunk: Chunk) -> list[TokenLogprob]:
    prompt = chunk.sequence.prompt_ids
    return [TokenLogprob(token_id=token, logprob=-1.0) for token in prompt[chunk.start + 1 : chunk.stop + 1]]


def ref(name: str, revision: int = 0) -> AdapterRef:
    return AdapterRef(name=name, path=f"/adapters/{name}", revision=revision)


SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 9, "huge": 40}


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, aborts, late and failing loads and failing steps in any order, over a pool that is far too small."""

    @initialize(num_pages=st.integers(4, 24))
    def start(self, num_pages: int) -> None:
        self.engine = Engine(num_pages, SIZES)
        self.count = 0

    @rule(
        adapter=st.sampled_from([None, None, None, "a", "b", *SIZES]),
        revision=st.integers(0, 1),
        length=st.integers(1, 40),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.sampled_from([0, 1, 3, 10, 30]),
        min_tokens=st.sampled_from([0, 0, 5]),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        adapter: str | None,
        revision: int,
        length: int,
        n: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        prompt_logprobs: int | None,
    ) -> None:
        self.count += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=prompt_logprobs,
            frequency_penalty=0.1 * (self.count % 2),
            seed=self.count,
        )
        self.engine.add(
            Generate(
                request_id=str(self.count),
                prompt_ids=[(self.count + i) % VOCABULARY for i in range(length)],
                params=params,
                adapter=None if adapter is None else ref(adapter, revision),
                n=n,
            )
        )

    @rule(steps=st.integers(1, 12))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.engine.open_choices)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        name, index = data.draw(st.sampled_from(self.engine.open_choices))
        self.engine.abort(name, None if whole else index)

    @precondition(lambda self: self.engine.open_choices)
    @rule(data=st.data(), whole=st.booleans())
    def abort_during_a_step(self, data: st.DataObject, whole: bool) -> None:
        plan = self.engine.plan()
        if self.engine.open_choices:
            self.abort(data, whole)
        self.engine.scheduler.check_integrity()
        self.engine.finish(plan)

    @precondition(lambda self: self.engine.accepted)
    @rule(data=st.data())
    def abort_what_may_be_over(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(list(self.engine.accepted))))

    @precondition(lambda self: self.engine.directory.loading)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end_a_load(self, data: st.DataObject, fails: bool) -> None:
        directory = self.engine.directory
        loading = data.draw(st.sampled_from(directory.loading))
        (directory.fail if fails else directory.finish)(loading)

    @precondition(lambda self: self.engine.directory.loading)
    @rule()
    def end_all_loads(self) -> None:
        for loading in self.engine.directory.loading:
            self.engine.directory.finish(loading)

    @rule()
    def evict_from_the_host(self) -> None:
        self.engine.directory.forget_unheld()

    @rule(name=st.sampled_from(sorted(SIZES)))
    def drop_from_the_pool(self, name: str) -> None:
        self.engine.adapters.drop(identity_of(ref(name)))

    @precondition(lambda self: self.count % 5 == 4)
    @rule()
    def fail_a_step(self) -> None:
        self.engine.plan()
        self.engine.note_failures(self.engine.scheduler.fail_all(EngineError("the step failed")))
        assert not self.engine.scheduler.has_work
        assert self.engine.open_choices == []

    @invariant()
    def owners_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()
            assert self.engine.scheduler.has_work == bool(self.engine.open_choices)
            assert len(self.engine.scheduler.waiting_adapters) <= CONFIG.max_loading

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()
            self.engine.check_that_all_is_over()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def random_request(rng: random.Random, number: int, adapters: list[str]) -> Generate:
    adapter = rng.choice(adapters) if rng.random() < 0.8 else None
    return Generate(
        request_id=str(number),
        prompt_ids=[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))],
        params=SamplingParams(
            max_tokens=rng.randint(0, 25),
            seed=number,
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=rng.choice([None, None, 1]),
        ),
        adapter=None if adapter is None else ref(adapter),
        n=rng.choice([1, 1, 1, 2, 4]),
    )


def test_outputs_do_not_depend_on_preemption() -> None:
    rng = random.Random(1)
    requests = [random_request(rng, number, ["a", "b", "c"]) for number in range(15)]
    spacious, cramped = Engine(400, SIZES), Engine(18, SIZES)
    for engine in (spacious, cramped):
        for request in requests:
            assert engine.add(request)
            engine.step()
            engine.step()
        engine.drain()
        engine.check_that_all_is_over()
    assert spacious.scheduler.preemptions == 0
    assert cramped.scheduler.preemptions > 0
    tokens = [
        {choice: [output.token_ids for output in outputs] for choice, outputs in engine.outputs.items()}
        for engine in (spacious, cramped)
    ]
    assert tokens[0] == tokens[1]


def test_whoever_came_first_never_gives_way() -> None:
    engine = Engine(8, SIZES)
    for number in range(6):
        params = SamplingParams(max_tokens=28, seed=number, ignore_eos=True)
        assert engine.add(Generate(request_id=str(number), prompt_ids=[1, 2, 3], params=params))
    ran: set[str] = set()
    while engine.open_choices:
        oldest, _ = engine.open_choices[0]
        ran_before = oldest in ran
        ran = {chunk.sequence.request.request_id for chunk in engine.step().chunks}
        assert oldest in ran or not ran_before
    assert engine.scheduler.preemptions > 0
    engine.check_that_all_is_over()


@pytest.mark.parametrize("seed", range(2))
def test_many_requests_over_a_pool_of_few_adapters_all_end(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"adapter-{i}": rng.choice([2, 3, 4]) for i in range(100)}
    engine = Engine(30, sizes)
    waiting = [random_request(rng, number, list(sizes)) for number in range(250)]
    while waiting or engine.scheduler.has_work:
        while waiting and rng.random() < 0.5:
            if engine.scheduler.num_waiting >= CONFIG.max_waiting:
                with pytest.raises(OverloadedError):
                    engine.scheduler.add(waiting[-1])
                break
            assert engine.add(waiting.pop())
        if engine.directory.loading and rng.random() < 0.7:
            engine.directory.finish(rng.choice(engine.directory.loading))
        if rng.random() < 0.1:
            engine.directory.forget_unheld()
        plan = engine.plan()
        if engine.open_choices and rng.random() < 0.05:
            name, index = rng.choice(engine.open_choices)
            engine.abort(name, rng.choice([None, index]))
        engine.finish(plan)
    engine.check_that_all_is_over()
    assert engine.adapters.evictions > 50
