from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex.server.adapter_directory import AdapterLoading
from loraplex.server.errors import EngineError
from loraplex.server.messages import TokenLogprob, TokenOutput
from loraplex.server.scheduler import SampledToken

Make = Callable[..., Any]

EOS = 99
TOKEN = 7


def test_decodes_come_before_prompts_and_prompts_get_the_rest(make_rig: Make) -> None:
    rig = make_rig(max_batch_tokens=10, prefill_chunk=8)
    rig.add("first")
    rig.add("second")
    rig.step()
    rig.add("long", prompt=20)
    assert rig.spans(rig.scheduler.schedule()) == [("first", 4, 5), ("second", 4, 5), ("long", 0, 8)]


def test_a_prompt_takes_as_many_steps_as_it_needs(make_rig: Make) -> None:
    rig = make_rig(max_batch_tokens=10, prefill_chunk=8)
    rig.add("long", prompt=19)
    rig.add("short", prompt=3)
    seen = []
    for _ in range(4):
        plan = rig.scheduler.schedule()
        seen.append([(*chunk, c.samples) for chunk, c in zip(rig.spans(plan), plan.chunks, strict=True)])
        rig.complete(plan)
    assert seen == [
        [("long", 0, 8, False), ("short", 0, 2, False)],
        [("short", 2, 3, True), ("long", 8, 16, False)],
        [("short", 3, 4, True), ("long", 16, 19, True)],
        [("long", 19, 20, True), ("short", 4, 5, True)],
    ]


def test_as_many_run_as_the_token_budget_can_decode(make_rig: Make) -> None:
    rig = make_rig(max_batch_tokens=3)
    for name in "abcd":
        rig.add(name, prompt=1)
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (3, 1)


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
    make_rig: Make, params: dict[str, object], token: int, count: int, reason: str
) -> None:
    rig = make_rig()
    rig.add("r", **params)  # type: ignore[arg-type]
    outputs: list[TokenOutput] = []
    while rig.scheduler.has_work:
        outputs += rig.step(token)
    assert [output.token_ids for output in outputs] == [[token]] * count
    assert [output.finish_reason for output in outputs] == [None] * (count - 1) + [reason]
    assert rig.num_unused == 64


def test_the_context_length_ends_a_sequence(make_rig: Make) -> None:
    rig = make_rig(max_model_len=10)
    rig.add("r", prompt=7, max_tokens=100)
    outputs = rig.drain()
    assert len(outputs) == 3
    assert outputs[-1].finish_reason == "length"


def test_a_prompt_that_is_only_scored_samples_nothing(make_rig: Make) -> None:
    rig = make_rig(prefill_chunk=3)
    rig.add("r", prompt=5, max_tokens=0, prompt_logprobs=0)
    assert rig.step() == []
    plan = rig.scheduler.schedule()
    assert not plan.chunks[0].samples
    (output,) = rig.complete(plan)
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 5


def test_logprobs_come_where_asked_for(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("with", logprobs=0)
    rig.add("without")
    plan = rig.scheduler.schedule()
    logprob = TokenLogprob(token_id=TOKEN, logprob=-0.5)
    with_, without = rig.scheduler.complete(plan, {0: SampledToken(TOKEN, logprob), 1: SampledToken(TOKEN)})
    assert with_.logprobs == [logprob]
    assert without.logprobs is None


def test_prompt_logprobs_are_gathered_over_chunks_and_sent_once(make_rig: Make) -> None:
    rig = make_rig(prefill_chunk=3)
    rig.add("r", prompt=8, prompt_logprobs=2, max_tokens=3)
    outputs = rig.drain()
    expected = [None, *(TokenLogprob(token_id=token, logprob=-1.0) for token in range(1001, 1008))]
    assert [output.prompt_logprobs for output in outputs] == [expected, None, None]


def test_prompt_logprobs_start_anew_after_a_preemption(make_rig: Make) -> None:
    rig = make_rig(num_pages=5, prefill_chunk=1)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("scored", prompt=11, prompt_logprobs=0, max_tokens=1)
    outputs = rig.drain()
    assert rig.scheduler.preemptions == 1
    (scored,) = [output for output in outputs if output.request_id == "scored"]
    assert scored.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in scored.prompt_logprobs] == [None, *range(2001, 2011)]


def test_the_latest_gives_way_and_returns_to_its_place_with_its_outputs(make_rig: Make) -> None:
    rig = make_rig(num_pages=5)
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
    assert rig.num_unused == 5


def test_a_preempted_sequence_computes_its_tokens_again(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("old", prompt=4, max_tokens=12)
    rig.add("young", prompt=4, max_tokens=6)
    seen = []
    while rig.scheduler.has_work:
        plan = rig.scheduler.schedule()
        seen.append(rig.spans(plan))
        rig.complete(plan)
    young = [chunk[1:] for step in seen for chunk in step if chunk[0] == "young"]
    assert young[:5] == [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert young[5] == (0, 9)
    assert young[6:] == []


def test_abort_reaches_a_sequence_wherever_it_is(make_rig: Make) -> None:
    rig = make_rig(max_running=2, max_loading=1)
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
    assert rig.num_unused == 64
    assert not rig.directory.holds.total()
    assert rig.scheduler.schedule().chunks == []


@pytest.mark.parametrize("index", [None, 0])
def test_pages_of_an_aborted_sequence_stay_until_its_step_is_over(make_rig: Make, index: int | None) -> None:
    rig = make_rig()
    rig.add("r", adapter="a")
    rig.add("s")
    plan = rig.scheduler.schedule()
    rig.scheduler.abort("r", index)
    rig.scheduler.check_integrity()
    assert rig.kv.pages(0)
    assert rig.directory.holds["a"] == 1
    rig.arrive()
    assert rig.adapters.pins("a") == 1
    assert [output.request_id for output in rig.complete(plan)] == ["s"]
    assert not rig.kv.pages(0)
    assert rig.adapters.num_evictable_pages == 2
    assert rig.directory.holds["a"] == 0


def test_one_choice_can_be_aborted_and_the_others_go_on(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", n=3, max_tokens=3)
    rig.step()
    rig.step()
    rig.scheduler.abort("r", 1)
    outputs = rig.drain()
    assert {output.index for output in outputs} == {0, 2}
    assert sum(output.finish_reason is not None for output in outputs) == 2


def test_one_request_can_be_failed(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r")
    rig.add("s")
    rig.step()
    failed = rig.scheduler.fail("r", EngineError("bad logits"))
    assert failed is not None
    assert (failed.request_id, failed.error.message) == ("r", "bad logits")
    assert rig.scheduler.fail("r", EngineError("again")) is None
    assert {output.request_id for output in rig.drain()} == {"s"}


def test_a_failed_step_ends_all_requests_and_forgets_half_copied_adapters(make_rig: Make) -> None:
    rig = make_rig()
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


def misuse_schedule_two_ahead(rig: Any) -> None:
    rig.scheduler.schedule()
    rig.scheduler.schedule()
    rig.scheduler.schedule()


def misuse_complete_out_of_turn(rig: Any) -> None:
    rig.scheduler.schedule()
    rig.complete(rig.scheduler.schedule())


def misuse_complete_twice(rig: Any) -> None:
    plan = rig.scheduler.schedule()
    rig.complete(plan)
    rig.complete(plan)


def misuse_add_twice(rig: Any) -> None:
    rig.add("r")


@pytest.mark.parametrize(
    "misuse", [misuse_schedule_two_ahead, misuse_complete_out_of_turn, misuse_complete_twice, misuse_add_twice]
)
def test_misuse_is_a_fault(make_rig: Make, misuse: Callable[[Any], None]) -> None:
    rig = make_rig()
    rig.add("r")
    with pytest.raises(AssertionError):
        misuse(rig)
