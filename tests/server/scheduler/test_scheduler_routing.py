"""Reporting the experts that routers choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplex.server.adapter_directory import AdapterReady
from loraplex.server.messages import TokenOutput

Make = Callable[..., Any]


def told(outputs: list[TokenOutput], request_id: str = "r", index: int = 0) -> list[list[int]]:
    """For each output of a choice the positions whose routing it tells: the rig sends token p to expert p."""
    mine = [output for output in outputs if (output.request_id, output.index) == (request_id, index)]
    return [[expert for choice in output.routing or () for (expert,) in choice.experts] for output in mine]


def test_each_output_tells_the_routes_of_the_tokens_before_it(make_rig: Make) -> None:
    rig = make_rig(prefill_chunk=3)
    rig.add("r", 8, adapter="a", max_tokens=3, return_routing=True)
    outputs = rig.drain()
    assert told(outputs) == [[0, 1, 2, 3, 4, 5, 6, 7], [8], [9]]
    starts = [choice.start for output in outputs for choice in output.routing]
    assert starts == [0, 3, 6, 8, 9]


def test_nobody_is_told_who_did_not_ask(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", adapter="a", max_tokens=2)
    plan = rig.scheduler.schedule()
    assert not plan.chunks[0].wants_routing
    assert [output.routing for output in rig.complete(plan) + rig.drain()] == [None, None]


def test_without_a_router_the_answer_is_empty(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", max_tokens=2, return_routing=True)
    assert [output.routing for output in rig.drain()] == [[], []]


def test_a_scored_prompt_has_its_routes(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", 5, adapter="a", max_tokens=0, return_routing=True)
    assert told(rig.drain()) == [[0, 1, 2, 3, 4]]


def test_an_activated_adapter_routes_from_its_invocation_on(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["alora"] = AdapterReady("alora", 2, invocation=(8,))
    rig.add("r", [1, 2, 8, 3], adapter="alora", max_tokens=2, return_routing=True)
    assert told(rig.drain()) == [[2, 3], [4]]


def test_the_prompt_is_told_with_choice_0_alone(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", 6, adapter="a", n=2, max_tokens=3, return_routing=True)
    outputs = rig.drain()
    assert told(outputs, index=0) == [[0, 1, 2, 3, 4, 5], [6], [7]]
    assert told(outputs, index=1) == [[], [6], [7]]
    assert [output.cached_tokens for output in outputs if output.index == 1] == [4, 0, 0]


def test_the_model_is_not_asked_for_routes_that_nobody_hears(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", 6, adapter="a", n=2, max_tokens=3, return_routing=True)
    rig.step()
    asked = [(c.sequence.index, c.start, c.stop, c.wants_routing) for c in rig.scheduler.schedule().chunks]
    assert asked == [(0, 6, 7, True), (1, 4, 6, False)]


def test_after_a_preemption_nothing_is_told_twice(make_rig: Make) -> None:
    rig = make_rig(num_pages=6, prefix_caching=False)
    rig.add("old", prompt=4, max_tokens=12)
    rig.add("r", 4, adapter="a", max_tokens=6, return_routing=True)
    outputs = rig.drain()
    assert rig.scheduler.preemptions == 1
    assert told(outputs) == [[0, 1, 2, 3], [4], [5], [6], [7], [8]]


def test_a_preempted_prompt_goes_on_where_its_routes_end(make_rig: Make) -> None:
    rig = make_rig(num_pages=5, prefill_chunk=1)
    rig.add("old", prompt=4, max_tokens=8)
    rig.add("r", 11, return_routing=True, max_tokens=1)
    plans = rig.plans()
    assert rig.scheduler.preemptions == 1
    wanted = [
        position
        for plan in plans
        for chunk in plan.chunks
        if chunk.wants_routing
        for position in range(chunk.start, chunk.stop)
    ]
    assert wanted == list(range(11))


def test_one_who_wants_routes_computes_every_token(make_rig: Make) -> None:
    rig = make_rig()
    prompt = list(range(100, 112))
    rig.add("first", prompt, adapter="a", max_tokens=1)
    rig.drain()
    rig.add("r", prompt, adapter="a", max_tokens=1, return_routing=True)
    rig.add("other", prompt, adapter="a", max_tokens=1)
    plan = rig.scheduler.schedule()
    assert rig.spans(plan) == [("r", 0, 12), ("other", 8, 12)]
    assert told(rig.complete(plan)) == [list(range(12))]
