"""The scheduler in a simulated engine, under anything in any order."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loraplex.server.errors import EngineError, OverloadedError
from loraplex.server.messages import Generate, SamplingParams, WeightedAdapter

NAMES = ["a", "b", "alias of b", "c", "d", "e", "huge", "activated", "mixture"]
MIXED = ["a", "b", "alias of b", "c", "d", "mixture"]
SMALL = ["a", "b", "alias of b", "c"]
VOCABULARY = 11


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, aborts, late and failing loads and failing steps in any order, over a pool that is far too small."""

    ahead = False

    def __init__(self, simulator: Any) -> None:
        super().__init__()
        self.simulator = simulator
        self.engine: Any = None

    @initialize(
        num_pages=st.integers(4, 24),
        prefix_caching=st.sampled_from([True, True, True, False]),
        by_value=st.booleans(),
    )
    def start(self, num_pages: int, prefix_caching: bool, by_value: bool) -> None:
        config = replace(self.simulator.CONFIG, prefix_caching=prefix_caching)
        self.engine = self.simulator.Engine(num_pages, config=config, ahead=self.ahead, by_value=by_value)
        self.count = 0

    @rule(
        adapter=st.sampled_from([None, None, "a", "b", "activated", *NAMES]),
        mix=st.lists(st.tuples(st.sampled_from(MIXED), st.sampled_from([0.5, 1.0, -1.0])), max_size=3),
        revision=st.integers(0, 1),
        family=st.integers(0, 2),
        common=st.sampled_from([0, 8, 13, 40, 40]),
        length=st.integers(1, 40),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.sampled_from([0, 1, 3, 10, 30]),
        min_tokens=st.sampled_from([0, 0, 5]),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        return_routing=st.booleans(),
        cache_salt=st.sampled_from(["", "", "salt"]),
    )
    def add(
        self,
        adapter: str | None,
        mix: list[tuple[str, float]],
        revision: int,
        family: int,
        common: int,
        length: int,
        n: int,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        prompt_logprobs: int | None,
        return_routing: bool,
        cache_salt: str,
    ) -> None:
        self.count += 1
        ref = self.simulator.ref
        if self.count % 3:
            mix = []
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=prompt_logprobs,
            frequency_penalty=0.1 * (self.count % (4 if self.ahead else 2) == 1),
            seed=self.count % 4,
        )
        self.engine.add(
            Generate(
                request_id=str(self.count),
                # Of one family, alike for the first ``common`` tokens.
                prompt_ids=[(family + i + (self.count if i >= common else 0)) % VOCABULARY for i in range(length)],
                params=params,
                adapter=None if adapter is None or mix else ref(adapter, revision),
                mix=tuple(WeightedAdapter(adapter=ref(name, revision), weight=weight) for name, weight in mix),
                n=n,
                return_routing=return_routing,
                cache_salt=cache_salt,
                first_token_within=(None, 0.1, 30.0)[self.count % 3],
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

    @precondition(lambda self: self.engine.open_choices and self.engine.can_plan)
    @rule(data=st.data(), whole=st.booleans())
    def abort_during_a_step(self, data: st.DataObject, whole: bool) -> None:
        self.engine.plan()
        if self.engine.open_choices:
            self.abort(data, whole)
        self.engine.scheduler.check_integrity()
        while self.engine.in_flight:
            self.engine.finish_first()

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

    @rule(name=st.sampled_from(SMALL))
    def ask_for(self, name: str) -> None:
        self.engine.scheduler.prefetcher.ask(self.engine.directory.pages_of(name))

    @rule(name=st.sampled_from(SMALL), kept=st.booleans())
    def keep_in_the_pool(self, name: str, kept: bool) -> None:
        prefetcher, image = self.engine.scheduler.prefetcher, self.engine.directory.pages_of(name)
        if not kept:
            prefetcher.unkeep(image.identity)
        elif image.num_pages <= self.engine.pool.num_pages:
            prefetcher.keep(image)

    @rule(name=st.sampled_from(NAMES))
    def drop_from_the_pool(self, name: str) -> None:
        self.engine.adapters.drop(self.engine.directory.identity(self.simulator.ref(name)))

    @precondition(lambda self: self.count % 5 == 4)
    @rule(seconds=st.sampled_from([0.0, 6.0]))
    def fill_the_host_with_mixes(self, seconds: float) -> None:
        self.engine.directory.is_full = True
        self.engine.step()
        self.engine.now += seconds
        self.engine.step()
        self.engine.directory.is_full = False

    @precondition(lambda self: self.count % 5 == 4)
    @rule(distrust=st.booleans())
    def fail_a_step(self, distrust: bool) -> None:
        if self.engine.can_plan:
            self.engine.plan()
        self.engine.fail_steps(EngineError("the step failed"))
        assert not self.engine.scheduler.has_work
        assert self.engine.open_choices == []
        if distrust:
            self.engine.kv.prefixes.clear()

    @invariant()
    def owners_agree(self) -> None:
        if self.engine is not None:
            self.engine.scheduler.check_integrity()
            self.engine.check_in_flight()
            assert self.engine.scheduler.has_work == bool(self.engine.open_choices)
            assert len(self.engine.scheduler.waiting_adapters) <= self.simulator.CONFIG.max_loading + 2

    def teardown(self) -> None:
        if self.engine is not None:
            self.engine.drain()
            self.engine.check_that_all_is_over()


def test_whatever_happens_every_request_ends_as_if_it_were_alone(simulator: Any) -> None:
    run_state_machine_as_test(
        lambda: SchedulerMachine(simulator),
        settings=settings(max_examples=120, stateful_step_count=40, deadline=None),
    )


class PipelineMachine(SchedulerMachine):
    """The same, with a step planned before the last one is done: between any two calls, anything may happen."""

    ahead = True

    @precondition(lambda self: self.engine.can_plan)
    @rule()
    def plan_a_step(self) -> None:
        self.engine.plan()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def finish_a_step(self) -> None:
        self.engine.finish_first()


def test_whatever_happens_while_steps_are_in_flight_every_request_ends_as_if_it_were_alone(simulator: Any) -> None:
    run_state_machine_as_test(
        lambda: PipelineMachine(simulator),
        settings=settings(max_examples=120, stateful_step_count=40, deadline=None),
    )


def random_request(
    rng: random.Random, number: int, adapters: list[str], simulator: Any, common: list[int] | None = None
) -> Generate:
    adapter = rng.choice(adapters) if rng.random() < 0.8 else None
    mix = rng.sample(adapters, 2) if adapter and rng.random() < 0.2 else []
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))]
    prompt = [*(common or [])[: rng.choice([0, 10, 20])], *prompt]
    return Generate(
        request_id=str(number),
        prompt_ids=prompt,
        params=SamplingParams(
            max_tokens=rng.randint(0, 25),
            seed=number,
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=rng.choice([None, None, 1]),
        ),
        adapter=None if adapter is None or mix else simulator.ref(adapter),
        mix=tuple(WeightedAdapter(adapter=simulator.ref(name), weight=rng.choice([0.5, 2.0])) for name in mix),
        n=rng.choice([1, 1, 1, 2, 4]),
        return_routing=rng.random() < 0.3,
        first_token_within=rng.choice([None, None, 0.1, 30.0]),
    )


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_outputs_depend_neither_on_preemption_nor_on_cached_prefixes(simulator: Any, prefix_caching: bool) -> None:
    rng = random.Random(1)
    common = [rng.randrange(VOCABULARY) for _ in range(20)]
    requests = [random_request(rng, number, ["a", "b", "c"], simulator, common) for number in range(20)]
    config = replace(simulator.CONFIG, prefix_caching=prefix_caching, max_waiting=100)
    plain = replace(config, prefix_caching=False)
    spacious, cramped = simulator.Engine(400, config=plain), simulator.Engine(20, config=config)
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


def test_whoever_came_first_never_gives_way(simulator: Any) -> None:
    engine = simulator.Engine(8)
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
def test_many_requests_over_a_pool_of_few_adapters_all_end(simulator: Any, seed: int) -> None:
    rng = random.Random(seed)
    adapters = {f"adapter-{i}": simulator.Adapter(rng.choice([2, 3, 4])) for i in range(100)}
    engine = simulator.Engine(30, adapters)
    common = [rng.randrange(VOCABULARY) for _ in range(20)]
    waiting = [random_request(rng, number, list(adapters), simulator, common) for number in range(250)]
    while waiting or engine.scheduler.has_work:
        while waiting and rng.random() < 0.5:
            if engine.scheduler.num_waiting >= simulator.CONFIG.max_waiting:
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
    assert engine.adapters.evictions > 50
    assert engine.scheduler.prefix_hit_tokens > 100
    engine.check_that_all_is_over()
