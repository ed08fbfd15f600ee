"""A step is planned while the last one is in flight."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loraplex.server.errors import EngineError
from loraplex.server.messages import Generate, SamplingParams

Make = Callable[..., Any]

EOS = 99
TOKEN = 7


def test_a_step_is_planned_over_tokens_that_are_not_known_yet(make_rig: Make) -> None:
    rig = make_rig(max_batch_tokens=10, prefill_chunk=8)
    rig.add("r", prompt=4)
    rig.add("long", prompt=20)
    first = rig.scheduler.schedule()
    second = rig.scheduler.schedule()
    assert rig.spans(second) == [("r", 4, 5), ("long", 6, 14)]
    assert [chunk.awaits_token for chunk in first.chunks + second.chunks] == [False, False, True, False]
    (sequence,) = [chunk.sequence for chunk in second.chunks if chunk.awaits_token]
    assert (sequence.num_pending, sequence.num_sampled, sequence.num_tokens) == (1, 1, 5)
    assert [output.token_ids for output in rig.complete(first, token=5)] == [[5]]
    assert (sequence.output_ids, sequence.num_pending, sequence.num_tokens) == ([5], 0, 5)
    third = rig.scheduler.schedule()
    assert rig.spans(third) == [("r", 5, 6), ("long", 14, 20)]
    assert [output.token_ids for output in rig.complete(second, token=6)] == [[6]]
    rig.complete(third)


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 3}, {"max_tokens": 50, "model": 7}, {"max_tokens": 50, "pages": 2}, {"max_tokens": 0}]
)
def test_an_end_that_can_be_counted_costs_no_row(make_rig: Make, limits: dict[str, int]) -> None:
    rig = make_rig(num_pages=limits.get("pages", 64), max_model_len=limits.get("model", 200))
    rig.add("r", prompt=4, max_tokens=limits["max_tokens"])
    ahead, rows = [rig.scheduler.schedule()], 0
    while ahead:
        following = rig.scheduler.schedule()
        rows += len(ahead[0].chunks)
        rig.complete(ahead.pop())
        ahead += [following] if following.chunks else []
    assert not rig.scheduler.has_work
    assert rows == {3: 3, 0: 1}.get(limits["max_tokens"], 3 if "model" in limits else 5)


def test_an_end_by_content_wastes_one_row_and_keeps_its_pages_so_long(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", adapter="a")
    rig.add("s")
    first = rig.scheduler.schedule()
    second = rig.scheduler.schedule()
    outputs = rig.complete(first, token=EOS)
    assert [output.finish_reason for output in outputs] == ["stop", "stop"]
    assert not rig.scheduler.has_work
    assert rig.kv.pages(0)
    assert rig.adapters.pins("a") == 1
    assert rig.complete(second) == []
    assert not rig.kv.pages(0)
    assert rig.adapters.pins("a") == rig.directory.holds["a"] == 0


def test_who_is_preempted_in_flight_still_gets_its_token(make_rig: Make) -> None:
    rig = make_rig(num_pages=5)
    rig.add("old", prompt=7, max_tokens=8)
    rig.add("young", prompt=7, max_tokens=8)
    first = rig.scheduler.schedule()
    second = rig.scheduler.schedule()
    rig.complete(first, token=5)
    third = rig.scheduler.schedule()
    assert rig.scheduler.preemptions == 1
    assert rig.spans(third) == [("old", 8, 9)]
    young = second.chunks[1].sequence
    assert (young.num_pending, rig.kv.pages(young.seq_id)) == (1, [])
    outputs = rig.complete(second, token=6)
    assert [output.token_ids for output in outputs] == [[6], [6]]
    assert (young.output_ids, young.num_pending, young.num_tokens) == ([5, 6], 0, 9)
    rig.complete(third)
    outputs = rig.drain()
    assert sum(len(output.token_ids) for output in outputs if output.request_id == "young") == 6


def test_the_first_output_of_who_is_preempted_in_flight_has_the_whole_prompt(make_rig: Make) -> None:
    rig = make_rig(num_pages=4, prefill_chunk=6)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("scored", prompt=11, max_tokens=1, prompt_logprobs=0)
    outputs, plan = [], rig.scheduler.schedule()
    while rig.scheduler.has_work:
        following = rig.scheduler.schedule()
        outputs += rig.complete(plan)
        plan = following if following.chunks or not rig.scheduler.has_work else rig.scheduler.schedule()
    (scored,) = [output for output in outputs if output.request_id == "scored"]
    assert scored.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in scored.prompt_logprobs] == [None, *range(2001, 2011)]


def test_who_runs_alone_waits_for_pages_of_the_step_in_flight(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("stays", prompt=6, max_tokens=8)
    rig.add("gone", prompt=3, max_tokens=8)
    rig.complete(rig.scheduler.schedule())
    first = rig.scheduler.schedule()
    second = rig.scheduler.schedule()
    assert rig.spans(second) == [("stays", 7, 8), ("gone", 4, 5)]
    rig.complete(first)
    rig.scheduler.abort("gone")
    assert rig.pool.num_free == 0
    assert rig.scheduler.schedule().chunks == []
    rig.complete(second)
    assert rig.drain()[-1].finish_reason == "length"
    assert rig.scheduler.preemptions == 0


def test_a_line_that_waits_for_the_step_in_flight_holds_nobody_up(make_rig: Make) -> None:
    rig = make_rig(num_pages=2)
    rig.add("gone", prompt=8, max_tokens=1)
    rig.add("next", prompt=8, max_tokens=1)
    first = rig.scheduler.schedule()
    assert rig.scheduler.schedule().chunks == []
    rig.complete(first)
    first = rig.scheduler.schedule()
    assert rig.spans(first) == [("next", 0, 8)]
    rig.add("last", prompt=8, max_tokens=1)
    rig.scheduler.abort("next")
    assert rig.scheduler.schedule().chunks == []
    assert rig.complete(first) == []
    assert [output.request_id for output in rig.drain()] == ["last"]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_needs_the_step_completed_before_the_next(make_rig: Make, penalty: str) -> None:
    rig = make_rig(prefill_chunk=4)
    rig.add("plain")
    plan = rig.scheduler.schedule()
    assert not plan.needs_completion
    rig.complete(plan)
    rig.add("penalized", prompt=8, **{penalty: 0.5})
    plan = rig.scheduler.schedule()
    assert not plan.needs_completion, "it samples nothing for it yet"
    following = rig.scheduler.schedule()
    assert following.needs_completion
    rig.complete(plan)
    with pytest.raises(AssertionError, match="before its last token is known"):
        rig.scheduler.schedule()


def test_a_failure_gives_up_both_steps(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("old", adapter="old")
    first = rig.scheduler.schedule()
    rig.scheduler.abort("old")
    rig.add("new", adapter="new", n=2)
    second = rig.scheduler.schedule()
    assert [page_in.identity for page_in in first.page_ins + second.page_ins] == ["old", "new"]
    failed = rig.scheduler.fail_all(EngineError("out of memory"))
    assert [message.request_id for message in failed] == ["new"]
    assert rig.adapters.resident == ()
    assert not rig.scheduler.has_work
    assert not rig.directory.holds.total()
    rig.scheduler.check_integrity()
    rig.kv.prefixes.clear()
    assert rig.pool.num_free == 64


def random_requests(rng: random.Random, simulator: Any, count: int) -> list[Generate]:
    common = [rng.randrange(11) for _ in range(20)]
    requests = []
    for number in range(count):
        adapter = rng.choice([None, "a", "b", "c", "activated"])
        length = rng.randint(1, 20)
        requests.append(
            Generate(
                request_id=str(number),
                prompt_ids=[*common[: rng.choice([0, 10, 20])], *[rng.randrange(11) for _ in range(length)]],
                params=SamplingParams(
                    max_tokens=rng.choice([0, 1, 5, 25, 25]),
                    min_tokens=rng.choice([0, 0, 3]),
                    seed=number,
                    ignore_eos=rng.random() < 0.4,
                    prompt_logprobs=rng.choice([None, None, 1]),
                    presence_penalty=rng.choice([0.0] * 9 + [0.5]),
                ),
                adapter=None if adapter is None else simulator.ref(adapter),
                n=rng.choice([1, 1, 1, 2, 4]),
                return_routing=rng.random() < 0.3,
            )
        )
    return requests


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_outputs_are_those_of_steps_that_are_completed_one_by_one(simulator: Any, prefix_caching: bool) -> None:
    requests = random_requests(random.Random(3), simulator, 60)
    config = replace(simulator.CONFIG, prefix_caching=prefix_caching, max_waiting=1000)
    told = []
    for ahead in (False, True):
        engine = simulator.Engine(20, config=config, ahead=ahead)
        for request in requests:
            assert engine.add(request)
            for _ in range(4):
                engine.step()
                engine.check_in_flight()
        engine.drain()
        engine.check_that_all_is_over()
        assert not engine.failures
        told.append({choice: [output.token_ids for output in found] for choice, found in engine.outputs.items()})
    assert told[0] == told[1]
    assert engine.counts["ahead"] > 100
    assert min(engine.counts["wasted"], engine.counts["preempted in flight"]) > 5


def test_failing_and_aborted_steps_leave_nothing_behind(simulator: Any) -> None:
    rng = random.Random(5)
    requests = random_requests(rng, simulator, 60)
    engine = simulator.Engine(20, ahead=True)
    while requests or engine.scheduler.has_work:
        if requests and rng.random() < 0.3:
            engine.add(requests.pop())
        if engine.open_choices and rng.random() < 0.05:
            name, index = rng.choice(engine.open_choices)
            engine.abort(name, rng.choice([None, index]))
        if rng.random() < 0.02:
            if engine.can_plan and rng.random() < 0.5:
                engine.plan()
            engine.fail_steps(EngineError("the device is gone"))
            engine.kv.prefixes.clear()
        for loading in engine.directory.loading:
            engine.directory.finish(loading)
        engine.step()
        engine.check_in_flight()
        engine.scheduler.check_integrity()
    engine.drain()
    engine.check_that_all_is_over()
    assert engine.failures
