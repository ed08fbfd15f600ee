from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.server.errors import (
    AdapterInvalidError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
)
from loraplex.server.messages import AdapterRef, Generate, SamplingParams, TokenLogprob, TokenOutput
from loraplex.server.request import Sequence, SequenceState, choice_seed, make_request
from loraplex.server.scheduler import (
    AdapterFailed,
    AdapterLoading,
    AdapterReady,
    AdapterStatus,
    SampledToken,
    Scheduler,
    SchedulerConfig,
    StepPlan,
)

EOS = 99
TOKEN = 7


class Directory:
    """Every adapter takes 2 pages and is ready, unless ``status`` says otherwise."""

    def __init__(self) -> None:
        self.status: dict[str, AdapterStatus] = {}
        self.holds: Counter[str] = Counter()
        self.lookups: list[str] = []

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        self.lookups.append(ref.name)
        return self.status.get(ref.name, AdapterReady(ref.name, 2))

    def hold(self, ref: AdapterRef) -> None:
        self.holds[ref.name] += 1

    def release_hold(self, ref: AdapterRef) -> None:
        self.holds[ref.name] -= 1


class Rig:
    """A scheduler over ``num_pages`` pages of 4 tokens, whose sampled token is always ``TOKEN``."""

    def __init__(self, num_pages: int = 64, **limits: int) -> None:
        self.now = 0.0
        self.pool = PagePool(num_pages)
        self.kv = KvCache(self.pool, page_tokens=4)
        self.adapters = AdapterCache(self.pool)
        self.directory = Directory()
        config = SchedulerConfig(**{"max_model_len": 200, **limits}, eos_token_ids=frozenset({EOS}))
        self.scheduler = Scheduler(config, self.pool, self.kv, self.adapters, self.directory, clock=lambda: self.now)

    def add(
        self,
        name: str,
        prompt: int = 4,
        *,
        adapter: str | None = None,
        n: int = 1,
        max_tokens: int = 8,
        **params: object,
    ) -> None:
        ref = None if adapter is None else AdapterRef(name=adapter, path=adapter)
        sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
        self.scheduler.add(Generate(request_id=name, prompt_ids=list(range(prompt)), params=sampling, adapter=ref, n=n))

    def complete(self, plan: StepPlan, token: int = TOKEN) -> list[TokenOutput]:
        results = {chunk.sequence.seq_id: SampledToken(token) for chunk in plan.chunks if chunk.samples}
        logprobs = {
            chunk.sequence.seq_id: [
                TokenLogprob(token_id=token, logprob=-1.0)
                for token in chunk.sequence.prompt_ids[chunk.start + 1 : chunk.stop + 1]
            ]
            for chunk in plan.chunks
            if chunk.wants_prompt_logprobs
        }
        outputs = self.scheduler.complete(plan, results, logprobs)
        self.scheduler.check_integrity()
        return outputs

    def step(self, token: int = TOKEN) -> list[TokenOutput]:
        return self.complete(self.scheduler.schedule(), token)

    def drain(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for _ in range(1000):
            if not self.scheduler.has_work:
                return outputs
            outputs += self.step()
        raise AssertionError("no progress")


def chunks(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.request_id, chunk.start, chunk.stop) for chunk in plan.chunks]


def sequence(**params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=5, **params)  # type: ignore[arg-type]
    generate = Generate(request_id="r", prompt_ids=[1, 2, 3], params=sampling)
    eos = frozenset({EOS})
    return make_request(generate, first_seq_id=0, arrival=0.0, max_total_tokens=100, eos_token_ids=eos).sequences[0]


@pytest.mark.parametrize(
    "states",
    [
        [SequenceState.WAITING],
        [SequenceState.RUNNING, SequenceState.RUNNING],
        [SequenceState.FINISHED, SequenceState.RUNNING],
        [SequenceState.FINISHED, SequenceState.FINISHED],
    ],
)
def test_an_illegal_change_of_state_is_a_fault(states: list[SequenceState]) -> None:
    subject = sequence()
    *legal, illegal = states
    for state in legal:
        subject.enter(state)
    with pytest.raises(AssertionError, match=f"sequence 0: {subject.state.value} -> {illegal.value}"):
        subject.enter(illegal)


def test_slices_of_tokens_run_across_prompt_and_output() -> None:
    subject = sequence()
    for token in (4, 5, 6):
        subject.append(token)
    tokens = [1, 2, 3, 4, 5, 6]
    for start in range(7):
        for stop in range(start, 7):
            assert subject.token_slice(start, stop) == tokens[start:stop]


def test_sampled_tokens_are_counted_only_under_a_penalty() -> None:
    plain, counted = sequence(), sequence(presence_penalty=0.5)
    for subject in (plain, counted):
        subject.append(4)
        subject.append(4)
    assert plain.output_counts is None
    assert counted.output_counts == {4: 2}


def test_seeds_of_choices_are_reproducible_and_far_apart() -> None:
    seeds = [choice_seed(seed, index) for seed in (-1, 0, 1, 2**64) for index in range(64)]
    assert seeds[0] == choice_seed(-1, 0)
    assert choice_seed(2**64, 3) == choice_seed(0, 3)
    assert len(set(seeds)) == 3 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sequence().seed != sequence().seed


def test_limits_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="prefill_chunk is at least 1, not 0"):
        SchedulerConfig(max_model_len=8, prefill_chunk=0)


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused_with_the_numbers() -> None:
    rig = Rig(max_model_len=10)
    rig.add("fits", 9)
    rig.add("scored only", 10, max_tokens=0)
    with pytest.raises(ContextLengthError, match=r"10 tokens and room for one more is needed, .* context is 10"):
        rig.add("full", 10)
    with pytest.raises(ContextLengthError, match="11 tokens, but the model's context is 10"):
        rig.add("over", 11, max_tokens=0)
    assert rig.scheduler.num_waiting == 2


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    rig = Rig(num_pages=3)
    rig.add("fits", 12)
    with pytest.raises(ContextLengthError, match="13 tokens needs 4 pages, but the pool has 3"):
        rig.add("over", 13)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        Rig().add("empty", 0)


def test_a_full_queue_refuses_new_requests() -> None:
    rig = Rig(max_waiting=3)
    rig.add("a", n=2)
    rig.add("b", n=4)
    with pytest.raises(OverloadedError, match="6 sequences are waiting, and the limit is 3"):
        rig.add("c")


def test_an_adapter_larger_than_the_pool_fails_its_request_with_the_numbers() -> None:
    rig = Rig(num_pages=4)
    rig.directory.status["big"] = AdapterReady("big", 5)
    rig.add("r", adapter="big", n=2)
    (failed,) = rig.scheduler.schedule().failed
    assert failed.error.name == "AdapterTooLargeError"
    assert failed.error.message == "Adapter 'big' needs 5 pages, but the pool has 4."
    assert not rig.scheduler.has_work
    assert not rig.directory.holds.total()


def test_an_adapter_that_leaves_no_room_for_the_prompt_fails_its_request() -> None:
    rig = Rig(num_pages=4)
    rig.add("r", prompt=9, adapter="a")
    (failed,) = rig.scheduler.schedule().failed
    assert failed.error.name == "ContextLengthError"
    assert failed.error.message == ("The prompt of 9 tokens needs 3 pages and adapter 'a' needs 2, but the pool has 4.")


def test_what_fits_the_pool_exactly_runs_to_its_last_page() -> None:
    rig = Rig(num_pages=4)
    rig.add("r", prompt=8, adapter="a", max_tokens=100)
    outputs = rig.drain()
    # The last token sampled needs no room: 8 tokens fit beside the adapter, the ninth is the answer.
    assert [output.token_ids for output in outputs] == [[TOKEN]]
    assert outputs[-1].finish_reason == "length"
    rig.add("shorter", prompt=6, adapter="a", max_tokens=100)
    assert len(rig.drain()) == 3


def test_decodes_come_before_prompts_and_prompts_get_the_rest() -> None:
    rig = Rig(max_batch_tokens=10, prefill_chunk=8)
    rig.add("first")
    rig.add("second")
    rig.step()
    rig.add("long", prompt=20)
    assert chunks(rig.scheduler.schedule()) == [("first", 4, 5), ("second", 4, 5), ("long", 0, 8)]


def test_a_prompt_takes_as_many_steps_as_it_needs() -> None:
    rig = Rig(max_batch_tokens=10, prefill_chunk=8)
    rig.add("long", prompt=19)
    rig.add("short", prompt=3)
    seen = []
    for _ in range(4):
        plan = rig.scheduler.schedule()
        seen.append([(*chunk, c.samples) for chunk, c in zip(chunks(plan), plan.chunks, strict=True)])
        rig.complete(plan)
    assert seen == [
        [("long", 0, 8, False), ("short", 0, 2, False)],
        [("short", 2, 3, True), ("long", 8, 16, False)],
        [("short", 3, 4, True), ("long", 16, 19, True)],
        [("long", 19, 20, True), ("short", 4, 5, True)],
    ]


def test_as_many_run_as_the_token_budget_can_decode() -> None:
    rig = Rig(max_batch_tokens=3)
    for name in "abcd":
        rig.add(name, prompt=1)
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (3, 1)


def test_the_first_output_carries_the_times() -> None:
    rig = Rig()
    rig.add("earlier", adapter="a", max_tokens=1)
    rig.drain()
    rig.now = 5.0
    rig.add("base", max_tokens=2)
    rig.add("hit", adapter="a", max_tokens=1)
    rig.now = 6.0
    base, hit, after = rig.drain()
    assert (base.queue_seconds, base.adapter_load_seconds) == (1.0, None)
    assert (hit.queue_seconds, hit.adapter_load_seconds) == (1.0, 0.0)
    assert (after.queue_seconds, after.adapter_load_seconds) == (None, None)


def test_waiting_for_an_adapter_is_timed_from_its_first_lookup() -> None:
    rig = Rig()
    rig.directory.status["a"] = AdapterLoading()
    rig.add("r", adapter="a", max_tokens=2)
    rig.now = 2.0
    rig.step()
    del rig.directory.status["a"]
    rig.now = 5.0
    first, second = rig.drain()
    assert (first.queue_seconds, first.adapter_load_seconds) == (5.0, 3.0)
    assert (second.queue_seconds, second.adapter_load_seconds) == (None, None)


@pytest.mark.parametrize(
    ("params", "token", "count", "reason"),
    [
        ({}, EOS, 1, "stop"),
        ({"ignore_eos": True}, EOS, 8, "length"),
        ({"min_tokens": 3}, EOS, 3, "stop"),
        ({"stop_token_ids": (TOKEN,)}, TOKEN, 1, "stop"),
        ({"stop_token_ids": (TOKEN,), "ignore_eos": True, "min_tokens": 2}, TOKEN, 2, "stop"),
        ({}, TOKEN, 8, "length"),
        ({"max_tokens": 1}, EOS, 1, "stop"),
    ],
)
def test_a_sequence_ends_at_a_stop_token_or_at_its_length(
    params: dict[str, object], token: int, count: int, reason: str
) -> None:
    rig = Rig()
    rig.add("r", **params)  # type: ignore[arg-type]
    outputs: list[TokenOutput] = []
    while rig.scheduler.has_work:
        outputs += rig.step(token)
    assert [output.token_ids for output in outputs] == [[token]] * count
    assert [output.finish_reason for output in outputs] == [None] * (count - 1) + [reason]
    assert rig.pool.num_free == 64


def test_the_context_length_ends_a_sequence() -> None:
    rig = Rig(max_model_len=10)
    rig.add("r", prompt=7, max_tokens=100)
    outputs = rig.drain()
    assert len(outputs) == 3
    assert outputs[-1].finish_reason == "length"


def test_a_prompt_that_is_only_scored_samples_nothing() -> None:
    rig = Rig(prefill_chunk=3)
    rig.add("r", prompt=5, max_tokens=0, prompt_logprobs=0)
    assert rig.step() == []
    plan = rig.scheduler.schedule()
    assert not plan.chunks[0].samples
    (output,) = rig.complete(plan)
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 5


def test_logprobs_come_where_asked_for() -> None:
    rig = Rig()
    rig.add("with", logprobs=0)
    rig.add("without")
    plan = rig.scheduler.schedule()
    logprob = TokenLogprob(token_id=TOKEN, logprob=-0.5)
    with_, without = rig.scheduler.complete(plan, {0: SampledToken(TOKEN, logprob), 1: SampledToken(TOKEN)})
    assert with_.logprobs == [logprob]
    assert without.logprobs is None


def test_prompt_logprobs_are_gathered_over_chunks_and_sent_once() -> None:
    rig = Rig(prefill_chunk=3)
    rig.add("r", prompt=8, prompt_logprobs=2, max_tokens=3)
    outputs = rig.drain()
    expected = [None, *(TokenLogprob(token_id=token, logprob=-1.0) for token in range(1, 8))]
    assert [output.prompt_logprobs for output in outputs] == [expected, None, None]


def test_prompt_logprobs_start_anew_after_a_preemption() -> None:
    rig = Rig(num_pages=5, prefill_chunk=1)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("scored", prompt=11, prompt_logprobs=0, max_tokens=1)
    outputs = rig.drain()
    assert rig.scheduler.preemptions == 1
    (scored,) = [output for output in outputs if output.request_id == "scored"]
    assert scored.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in scored.prompt_logprobs] == [None, *range(1, 11)]


def test_an_adapter_is_paged_in_once_for_all_who_use_it() -> None:
    rig = Rig()
    rig.add("r", adapter="a")
    rig.add("s", adapter="a")
    plan = rig.scheduler.schedule()
    assert [(page_in.identity, page_in.pages) for page_in in plan.page_ins] == [("a", rig.adapters.pages("a"))]
    assert [chunk.adapter for chunk in plan.chunks] == ["a", "a"]
    assert rig.adapters.pins("a") == 2
    rig.complete(plan)
    rig.drain()
    assert rig.adapters.num_evictable_pages == 2
    assert not rig.directory.holds.total()


def test_a_loading_adapter_holds_up_nobody_else() -> None:
    rig = Rig()
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("slow", adapter="slow")
    rig.add("base")
    rig.add("fast", adapter="fast")
    assert [name for name, *_ in chunks(rig.scheduler.schedule())] == ["base", "fast"]


def test_those_who_waited_for_an_adapter_return_to_their_places() -> None:
    rig = Rig(max_running=1)
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("base", max_tokens=2)
    rig.add("slow", adapter="slow")
    rig.add("later")
    rig.step()
    del rig.directory.status["slow"]
    rig.step()
    assert [name for name, *_ in chunks(rig.scheduler.schedule())] == ["slow"]


def test_a_failed_load_fails_each_of_its_requests_once() -> None:
    rig = Rig()
    rig.directory.status["bad"] = AdapterLoading()
    rig.add("r", adapter="bad", n=3)
    rig.add("s", adapter="bad")
    rig.step()
    rig.directory.status["bad"] = AdapterFailed(AdapterInvalidError("no router", param="mlp.gate"))
    plan = rig.scheduler.schedule()
    assert [failed.request_id for failed in plan.failed] == ["r", "s"]
    assert plan.failed[0].error.param == "mlp.gate"
    assert not rig.scheduler.has_work
    assert not rig.directory.holds.total()
    assert rig.scheduler.schedule().failed == []


def test_only_so_many_adapters_load_at_once_and_the_line_goes_on() -> None:
    rig = Rig(max_loading=2, look_ahead=2)
    for name in "abcdef":
        rig.directory.status[name] = AdapterLoading()
        rig.add(name, adapter=name)
    rig.add("base")
    for _ in range(4):
        rig.step()
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["a", "b"]
    assert rig.scheduler.num_running == 1
    assert rig.directory.holds.total() == 2
    del rig.directory.status["a"]
    rig.step()
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["b", "c"]
    rig.directory.status.clear()
    assert {output.request_id for output in rig.drain()} == {*"abcdef", "base"}


def test_many_who_wait_for_one_adapter_leave_the_line_to_others() -> None:
    rig = Rig(look_ahead=2, max_running=2)
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("running", max_tokens=100)
    rig.step()
    for number in range(6):
        rig.add(str(number), adapter="slow")
    rig.add("base")
    for _ in range(4):
        rig.step()
    assert rig.scheduler.num_running == 2


def test_an_idle_step_looks_down_the_whole_line() -> None:
    rig = Rig(look_ahead=2, max_loading=1)
    for name in "abcdef":
        rig.directory.status[name] = AdapterLoading()
        rig.add(name, adapter=name)
    rig.add("base")
    assert [name for name, *_ in chunks(rig.scheduler.schedule())] == ["base"]


def test_adapters_are_fetched_while_nobody_can_come_in() -> None:
    rig = Rig(max_running=1)
    rig.add("running", max_tokens=100)
    rig.step()
    rig.add("r", adapter="a")
    rig.step()
    assert rig.directory.lookups == ["a"]


def test_idle_adapters_give_way_before_a_sequence_does() -> None:
    rig = Rig(num_pages=4)
    rig.add("r", adapter="a", max_tokens=1)
    rig.drain()
    assert rig.adapters.is_resident("a")
    rig.add("base", prompt=8, max_tokens=8)
    rig.drain()
    assert rig.scheduler.preemptions == 0
    assert not rig.adapters.is_resident("a")


def blocked_head(**limits: int) -> Rig:
    """ "large" is first in line and does not fit beside "running"."""
    rig = Rig(num_pages=10, **limits)
    rig.add("running", prompt=4, max_tokens=12)
    rig.step()
    rig.add("large", prompt=36, max_tokens=1)
    return rig


def test_one_who_does_not_fit_is_passed_only_so_often() -> None:
    rig = blocked_head(max_passes=3)
    for number in range(6):
        rig.add(f"small {number}", max_tokens=1)
    plan = rig.scheduler.schedule()
    assert [name for name, *_ in chunks(plan)] == ["running", "small 0", "small 1", "small 2"]
    rig.complete(plan)
    assert [name for name, *_ in chunks(rig.scheduler.schedule())] == ["running"]


def test_one_who_does_not_fit_comes_in_when_the_others_are_done() -> None:
    rig = blocked_head(max_passes=0)
    rig.add("small", max_tokens=1)
    order = [output.request_id for output in rig.drain()]
    assert order[-2:] == ["large", "small"]


def test_the_latest_gives_way_and_returns_to_its_place_with_its_outputs() -> None:
    rig = Rig(num_pages=5)
    rig.add("old", prompt=4, max_tokens=12)
    rig.add("young", prompt=4, max_tokens=8)
    rig.step()
    rig.add("third", prompt=4, max_tokens=8)
    while rig.scheduler.preemptions == 0:
        rig.step()
    outputs = rig.drain()
    resumed = [output for output in outputs if output.request_id == "young"]
    assert all(output.queue_seconds is None for output in resumed), "its first output had been sent"
    order = [output.request_id for output in outputs if output.finish_reason]
    assert order.index("young") < order.index("third")
    assert rig.pool.num_free == 5


def test_a_preempted_sequence_computes_its_tokens_again() -> None:
    rig = Rig(num_pages=4)
    rig.add("old", prompt=4, max_tokens=12)
    rig.add("young", prompt=4, max_tokens=6)
    seen = []
    while rig.scheduler.has_work:
        plan = rig.scheduler.schedule()
        seen.append(chunks(plan))
        rig.complete(plan)
    young = [chunk[1:] for step in seen for chunk in step if chunk[0] == "young"]
    assert young[:5] == [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert young[5] == (0, 9)
    assert young[6:] == []


def test_choices_share_the_prompt_of_the_first() -> None:
    rig = Rig(prefill_chunk=4)
    rig.add("r", prompt=10, n=3, max_tokens=4)
    for _ in range(3):
        plan = rig.scheduler.schedule()
        assert [chunk.sequence.index for chunk in plan.chunks] == [0]
        outputs = rig.complete(plan)
    assert [output.cached_tokens for output in outputs] == [0]
    plan = rig.scheduler.schedule()
    assert [(chunk.sequence.index, chunk.start, chunk.stop) for chunk in plan.chunks] == [
        (0, 10, 11),
        (1, 8, 10),
        (2, 8, 10),
    ]
    assert rig.kv.num_pages == 5
    assert [output.cached_tokens for output in rig.complete(plan)] == [0, 8, 8]
    rig.drain()
    assert rig.pool.num_free == 64


def test_a_prompt_of_whole_pages_leaves_its_last_token_to_compute() -> None:
    rig = Rig()
    rig.add("r", prompt=8, n=2)
    rig.step()
    plan = rig.scheduler.schedule()
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == [(8, 9), (4, 8)]


def test_choices_compute_the_prompt_themselves_when_the_first_is_gone() -> None:
    rig = Rig(prefill_chunk=4)
    rig.add("r", prompt=8, n=3)
    rig.step()
    rig.scheduler.abort("r", 0)
    plan = rig.scheduler.schedule()
    assert [(chunk.sequence.index, chunk.start) for chunk in plan.chunks] == [(1, 0), (2, 0)]


def test_choices_wait_for_the_first_while_it_is_preempted() -> None:
    rig = Rig(num_pages=6, prefill_chunk=1)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("r", prompt=15, n=2, max_tokens=2)
    outputs = rig.drain()
    assert rig.scheduler.preemptions == 1
    assert [output.cached_tokens for output in outputs if output.index == 1] == [12, 0]


def test_the_choice_that_is_scored_computes_its_whole_prompt() -> None:
    rig = Rig()
    rig.add("r", prompt=8, n=2, prompt_logprobs=0, max_tokens=2)
    plan = rig.scheduler.schedule()
    assert [chunk.wants_prompt_logprobs for chunk in plan.chunks] == [True]
    rig.complete(plan)
    plan = rig.scheduler.schedule()
    assert [(c.sequence.index, c.start, c.wants_prompt_logprobs) for c in plan.chunks] == [(0, 8, False), (1, 4, False)]


def test_abort_reaches_a_sequence_wherever_it_is() -> None:
    rig = Rig(max_running=2, max_loading=1)
    rig.directory.status |= {"a": AdapterLoading(), "b": AdapterLoading()}
    rig.add("running")
    rig.add("leader", n=2)
    rig.add("in line")
    rig.add("loading", adapter="a")
    rig.add("deferred", adapter="b")
    rig.step()
    for name in ("deferred", "loading", "in line", "leader", "running", "running", "unknown"):
        rig.scheduler.abort(name)
        rig.scheduler.check_integrity()
    assert not rig.scheduler.has_work
    assert rig.scheduler.num_waiting == 0
    assert rig.pool.num_free == 64
    assert not rig.directory.holds.total()
    assert rig.scheduler.schedule().chunks == []


@pytest.mark.parametrize("index", [None, 0])
def test_pages_of_an_aborted_sequence_stay_until_its_step_is_over(index: int | None) -> None:
    rig = Rig()
    rig.add("r", adapter="a")
    rig.add("s")
    plan = rig.scheduler.schedule()
    rig.scheduler.abort("r", index)
    rig.scheduler.check_integrity()
    assert rig.kv.pages(0)
    assert rig.adapters.pins("a") == 1
    assert rig.directory.holds["a"] == 1
    assert [output.request_id for output in rig.complete(plan)] == ["s"]
    assert not rig.kv.pages(0)
    assert rig.adapters.num_evictable_pages == 2
    assert rig.directory.holds["a"] == 0


def test_one_choice_can_be_aborted_and_the_others_go_on() -> None:
    rig = Rig()
    rig.add("r", n=3, max_tokens=3)
    rig.step()
    rig.step()
    rig.scheduler.abort("r", 1)
    outputs = rig.drain()
    assert {output.index for output in outputs} == {0, 2}
    assert sum(output.finish_reason is not None for output in outputs) == 2


def test_one_request_can_be_failed() -> None:
    rig = Rig()
    rig.add("r")
    rig.add("s")
    rig.step()
    failed = rig.scheduler.fail("r", EngineError("bad logits"))
    assert failed is not None
    assert (failed.request_id, failed.error.message) == ("r", "bad logits")
    assert rig.scheduler.fail("r", EngineError("again")) is None
    assert {output.request_id for output in rig.drain()} == {"s"}


def test_a_failed_step_ends_all_requests_and_forgets_half_copied_adapters() -> None:
    rig = Rig()
    rig.add("old", adapter="old")
    rig.step()
    rig.add("new", adapter="new", n=2)
    rig.add("base")
    rig.scheduler.schedule()
    failed = rig.scheduler.fail_all(EngineError("out of memory"))
    assert [message.request_id for message in failed] == ["old", "new", "base"]
    assert rig.adapters.resident == ("old",)
    assert not rig.scheduler.has_work
    rig.scheduler.check_integrity()
    rig.add("next", adapter="new", max_tokens=1)
    assert [page_in.identity for page_in in rig.scheduler.schedule().page_ins] == ["new"]


def misuse_schedule_twice(rig: Rig) -> None:
    rig.scheduler.schedule()
    rig.scheduler.schedule()


def misuse_complete_twice(rig: Rig) -> None:
    plan = rig.scheduler.schedule()
    rig.complete(plan)
    rig.complete(plan)


def misuse_add_twice(rig: Rig) -> None:
    rig.add("r")


@pytest.mark.parametrize("misuse", [misuse_schedule_twice, misuse_complete_twice, misuse_add_twice])
def test_misuse_is_a_fault(misuse: Callable[[Rig], None]) -> None:
    rig = Rig()
    rig.add("r")
    with pytest.raises(AssertionError):
        misuse(rig)


def test_a_step_looks_only_so_far_down_the_line() -> None:
    rig = Rig(look_ahead=5, max_running=1)
    rig.add("running", max_tokens=50)
    rig.step()
    for number in range(50):
        rig.add(str(number), adapter=f"adapter {number}")
    for _ in range(3):
        rig.step()
    assert rig.directory.lookups == [f"adapter {number}" for number in range(5)]
