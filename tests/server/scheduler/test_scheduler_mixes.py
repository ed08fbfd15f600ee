"""Weighted mixes of adapters, and adapters that act from their invocation on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex.server.adapter_directory import AdapterFailed, AdapterLoading, AdapterReady
from loraplex.server.errors import AdapterInvalidError, EngineError
from loraplex.server.messages import AdapterRef, Generate, SamplingParams, WeightedAdapter
from loraplex.server.request import NEVER, invocation_start

Make = Callable[..., Any]


def test_adapters_of_a_mix_load_at_once_and_come_in_together(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {"a": AdapterLoading(), "b": AdapterLoading()}
    rig.add("r", mix={"b": 0.3, "c": -1.0, "a": 0.7})
    rig.add("base")
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["base"]
    assert sorted(rig.directory.lookups) == ["a", "b", "c"]
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["a", "b"]
    assert all(rig.directory.holds[name] == 1 for name in "abc")
    assert rig.adapters.resident == ()


def test_a_mix_waits_for_the_last_of_its_adapters(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {"a": AdapterLoading(), "b": AdapterLoading()}
    rig.add("r", mix={"a": 0.7, "b": 0.3}, max_tokens=1)
    rig.step()
    del rig.directory.status["b"]
    rig.now = 3.0
    assert rig.scheduler.schedule().chunks == []
    assert rig.adapters.resident == ()
    del rig.directory.status["a"]
    rig.now = 5.0
    plan = rig.scheduler.schedule()
    assert [page_in.identity for page_in in plan.page_ins] == ["a", "b"]
    assert [chunk.adapters for chunk in plan.chunks] == [(("a", 0.7), ("b", 0.3))]
    assert plan.chunks[0].sequence.pinned == ("a", "b")
    (output,) = rig.complete(plan)
    assert output.adapter_load_seconds == 5.0
    assert not rig.directory.holds.total()
    assert rig.adapters.num_evictable_pages == 4


def test_what_a_mix_names_twice_counts_once_with_the_sum_of_its_weights(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["alias"] = AdapterReady("a", 2)
    names = [("b", 1.0), ("a", 0.5), ("b", -0.25), ("alias", 2.0)]
    parts = [WeightedAdapter(adapter=AdapterRef(name=name, path=name), weight=weight) for name, weight in names]
    params = SamplingParams(max_tokens=1)
    rig.scheduler.add(Generate(request_id="r", prompt_ids=[1], params=params, mix=tuple(parts)))
    plan = rig.scheduler.schedule()
    assert plan.chunks[0].adapters == (("a", 2.5), ("b", 0.75))
    assert sorted(page_in.ref.name for page_in in plan.page_ins) == ["a", "b"]
    rig.arrive()
    assert (rig.adapters.pins("a"), rig.adapters.pins("b")) == (1, 1)
    rig.complete(plan)
    assert not rig.directory.holds.total()


def test_a_mix_comes_in_when_all_its_adapters_fit(make_rig: Make) -> None:
    rig = make_rig(num_pages=8)
    rig.add("running", prompt=8, max_tokens=5)
    rig.step()
    rig.add("r", mix={"a": 1.0, "b": 1.0}, max_tokens=1)
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["running"]
    assert rig.adapters.resident == ()
    assert rig.kv.sequences == (0,)


def test_room_for_one_of_a_mix_is_not_made_by_putting_out_another(make_rig: Make) -> None:
    rig = make_rig(num_pages=5)
    for name in "ab":
        rig.add(name, adapter=name, max_tokens=1)
        rig.drain()
    assert rig.adapters.resident == ("a", "b")
    rig.add("r", mix={"a": 1.0, "c": 1.0}, max_tokens=1)
    plan = rig.scheduler.schedule()
    assert [page_in.identity for page_in in plan.page_ins] == ["c"]
    assert set(rig.adapters.resident) == {"a", "c"}


def test_a_mix_fails_with_the_name_of_the_adapter_that_failed(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {"slow": AdapterLoading(), "bad": AdapterLoading()}
    rig.add("r", mix={"slow": 1.0, "bad": 1.0, "good": 1.0}, n=2)
    rig.add("other", mix={"slow": 1.0, "good": 1.0})
    rig.step()
    rig.directory.status["bad"] = AdapterFailed(AdapterInvalidError("Adapter 'bad': no router", param="mlp.gate"))
    plan = rig.scheduler.schedule()
    assert [(failed.request_id, failed.error.message) for failed in plan.failed] == [("r", "Adapter 'bad': no router")]
    assert rig.directory.holds == {"slow": 1, "good": 1, "bad": 0}
    assert [ref.name for ref in rig.scheduler.waiting_adapters] == ["slow"]
    rig.scheduler.check_integrity()


def test_a_mix_of_which_one_is_ready_when_the_other_fails_fails_once(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {"a": AdapterLoading(), "b": AdapterLoading()}
    rig.add("r", mix={"a": 1.0, "b": 1.0})
    rig.step()
    rig.directory.status["a"] = AdapterFailed(AdapterInvalidError("no router"))
    del rig.directory.status["b"]
    assert [failed.request_id for failed in rig.scheduler.schedule().failed] == ["r"]
    assert rig.scheduler.waiting_adapters == ()
    assert not rig.directory.holds.total()


def test_an_adapter_that_cannot_be_mixed_is_refused_in_a_mix_and_served_alone(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["moe"] = AdapterReady("moe", 2, mix_problem="has experts that cannot be mixed")
    rig.add("mix", mix={"a": 1.0, "moe": 0.5})
    rig.add("half", mix={"moe": 0.5})
    rig.add("alone", adapter="moe")
    rig.add("whole", mix={"moe": 1.0})
    plan = rig.scheduler.schedule()
    assert [failed.request_id for failed in plan.failed] == ["mix", "half"]
    assert plan.failed[0].error.name == "InvalidRequestError"
    assert plan.failed[0].error.message == "Adapter 'moe' has experts that cannot be mixed."
    assert plan.failed[0].error.param == "adapter_id"
    assert [name for name, *_ in rig.spans(plan)] == ["alone", "whole"]
    assert rig.directory.holds == {"a": 0, "moe": 1}, "it is held for the copy into the pool alone"
    rig.arrive()
    assert not rig.directory.holds.total()


def test_a_mix_larger_than_the_pool_is_refused_with_the_numbers(make_rig: Make) -> None:
    rig = make_rig(num_pages=5)
    rig.add("three", mix={"a": 1.0, "b": 1.0, "c": 1.0})
    rig.add("prompt", prompt=8, mix={"a": 1.0, "b": 1.0})
    rig.add("fits", prompt=4, mix={"a": 1.0, "b": 1.0}, max_tokens=50)
    three, prompt = rig.scheduler.schedule().failed
    assert three.error.name == "AdapterTooLargeError"
    assert three.error.message == "Adapters 'a' and 'b' and 'c' together need 6 pages, but the pool has 5."
    assert prompt.error.name == "ContextLengthError"
    assert prompt.error.message == (
        "The prompt of 8 tokens needs 2 pages and adapters 'a' and 'b' together need 4, but the pool has 5."
    )
    assert rig.scheduler.num_running == 1
    assert rig.directory.holds.total() == 2


def test_a_mix_grows_to_what_the_pool_holds_beside_its_adapters(make_rig: Make) -> None:
    rig = make_rig(num_pages=6)
    rig.add("r", prompt=4, mix={"a": 1.0, "b": 1.0}, max_tokens=50)
    outputs = rig.drain()
    assert len(outputs) == 5
    assert outputs[-1].finish_reason == "length"


def test_one_mix_at_a_time_holds_some_adapters_while_it_waits_for_others(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {name: AdapterLoading() for name in "abd"}
    rig.add("first", mix={"a": 1.0, "b": 1.0}, max_tokens=1)
    rig.add("second", mix={"c": 1.0, "d": 1.0}, max_tokens=1)
    rig.add("here", mix={"e": 1.0, "f": 1.0}, max_tokens=1)
    rig.add("single", adapter="e", max_tokens=1)
    ended = [output.request_id for _ in range(3) for output in rig.step()]
    assert set(ended) == {"here", "single"}, "who waits for nothing passes"
    assert rig.directory.holds == {"a": 1, "b": 1, "e": 0, "f": 0}
    assert "d" not in rig.directory.lookups, "what a mix wants that has to wait does not even load"
    rig.scheduler.check_integrity()
    del rig.directory.status["a"], rig.directory.status["b"]
    assert [output.request_id for _ in range(3) for output in rig.step()] == ["first"]
    assert [ref.name for ref in rig.scheduler.waiting_adapters] == ["d"]
    del rig.directory.status["d"]
    assert [output.request_id for output in rig.drain()] == ["second"]
    assert not rig.directory.holds.total()


def test_a_mix_can_be_aborted_while_it_loads_and_the_one_behind_it_goes_on(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status |= {"a": AdapterLoading(), "b": AdapterLoading()}
    rig.add("r", mix={"a": 1.0, "b": 1.0})
    rig.add("s", mix={"b": 1.0, "c": 2.0})
    rig.add("t", mix={"b": 1.0, "d": 2.0})
    rig.step()
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["a", "b"]
    assert rig.directory.holds.total() == 2
    rig.scheduler.abort("t")
    rig.scheduler.abort("r")
    rig.scheduler.check_integrity()
    assert rig.scheduler.waiting_adapters == ()
    assert not rig.directory.holds.total()
    rig.step()
    assert [ref.name for ref in rig.scheduler.waiting_adapters] == ["b"]
    assert (rig.directory.holds["b"], rig.directory.holds["c"]) == (1, 1)
    rig.scheduler.abort("s")
    assert rig.scheduler.waiting_adapters == ()
    assert not rig.directory.holds.total()
    assert not rig.scheduler.has_work


def test_a_preempted_mix_gives_up_and_gets_back_all_its_pins(make_rig: Make) -> None:
    rig = make_rig(num_pages=9)
    rig.add("old", prompt=4, max_tokens=14)
    rig.add("mix", prompt=4, mix={"a": 1.0, "b": 0.5}, max_tokens=14)
    while not rig.scheduler.preemptions:
        rig.step()
    assert rig.adapters.pins("a") == rig.adapters.pins("b") == 0
    outputs = rig.drain()
    assert not rig.directory.holds.total()
    assert sum(len(output.token_ids) for output in outputs if output.request_id == "mix") > 0
    assert outputs[-1].finish_reason == "length"
    assert rig.num_unused + rig.adapters.num_evictable_pages == 9


def test_a_failed_step_drops_every_adapter_that_it_was_to_page_in(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("old", adapter="a")
    rig.step()
    rig.add("mix", mix={"a": 1.0, "b": 1.0, "c": 1.0})
    rig.scheduler.schedule()
    rig.scheduler.fail_all(EngineError("out of memory"))
    assert rig.adapters.resident == ("a",)
    assert not rig.directory.holds.total()
    rig.scheduler.check_integrity()


def test_an_adapter_unloaded_in_a_running_mix_stays_until_the_mix_ends(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("mix", mix={"a": 1.0, "b": 1.0}, max_tokens=3)
    rig.step()
    rig.adapters.drop("a")
    rig.scheduler.check_integrity()
    assert rig.adapters.is_resident("a")
    rig.drain()
    assert rig.adapters.resident == ("b",)


def test_a_running_mix_counts_for_each_of_its_adapters(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("mix", mix={"a": 1.0, "b": 1.0})
    rig.add("one", adapter="a")
    rig.add("base")
    rig.step()
    assert [rig.scheduler.num_open_under(AdapterRef(name=name, path=name)) for name in "abc"] == [2, 1, 0]


def test_a_mix_is_let_in_when_fewer_adapters_load_than_may(make_rig: Make) -> None:
    rig = make_rig(max_loading=2)
    for name in "abcd":
        rig.directory.status[name] = AdapterLoading()
    rig.add("first", adapter="a")
    rig.add("mix", mix={"b": 1.0, "c": 1.0})
    rig.add("later", adapter="d")
    rig.step()
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["a", "b", "c"]
    del rig.directory.status["b"]
    rig.step()
    assert rig.directory.holds["d"] == 0
    del rig.directory.status["c"]
    rig.step()
    assert sorted(ref.name for ref in rig.scheduler.waiting_adapters) == ["a", "d"]


def test_a_mix_that_fills_the_host_alone_is_given_up_and_the_one_behind_it_goes_on(make_rig: Make) -> None:
    rig = make_rig()
    for name in "bd":
        rig.directory.status[name] = AdapterLoading()
    rig.add("first", mix={"a": 1.0, "b": 1.0}, n=2)
    rig.add("second", mix={"c": 1.0, "d": 1.0}, max_tokens=1)
    rig.step()
    assert rig.directory.holds == {"a": 1, "b": 1}, "the second holds nothing that could be in the way"
    rig.directory.full_of = {"a"}
    for now in (1.0, 3.0, 5.9):
        rig.now = now
        assert rig.scheduler.schedule().failed == []
    rig.now = 6.0
    (failed,) = rig.scheduler.schedule().failed
    assert (failed.request_id, failed.error.name) == ("first", "AdapterTooLargeError")
    assert failed.error.message == "Adapters 'a', 'b' do not fit into the host store together."
    assert [ref.name for ref in rig.scheduler.waiting_adapters] == ["d"]
    rig.directory.full_of = None
    del rig.directory.status["d"]
    assert [output.request_id for output in rig.drain()] == ["second"]
    assert not rig.directory.holds.total()


def test_a_host_that_was_full_for_a_moment_fails_nobody(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["b"] = AdapterLoading()
    rig.add("mix", mix={"a": 1.0, "b": 1.0})
    rig.step()
    for now in range(6):
        rig.now = 4.9 * now
        rig.directory.full_of = {"a"} if now % 2 else None
        assert rig.scheduler.schedule().failed == []
    # Somebody else's image keeps the mix waiting: that one will go.
    rig.directory.full_of = {"a", "other"}
    for now in range(30, 50):
        rig.now = now
        assert rig.scheduler.schedule().failed == []


@pytest.mark.parametrize(
    ("prompt", "invocation", "start"),
    [
        ([1, 2, 3], (), 0),
        ([1, 2, 3], (2, 3), 1),
        ([1, 2, 1, 2, 5], (1, 2), 2),
        ([1, 1, 1, 1], (1, 1), 2),
        ([1, 2, 3], (1, 2, 3), 0),
        ([1, 2, 3], (3, 4), NEVER),
        ([2], (1, 2), NEVER),
        ([1, 2, 3], (2,), 1),
    ],
)
def test_an_activated_adapter_begins_at_the_last_invocation(
    prompt: list[int], invocation: tuple[int, ...], start: int
) -> None:
    assert invocation_start(prompt, invocation) == start


@pytest.mark.parametrize(("prompt", "start"), [([1, 8, 9, 2, 8, 9, 3], 4), ([1, 8, 8, 9], 2), ([9, 8, 1], NEVER)])
def test_chunks_say_where_their_adapter_begins(make_rig: Make, prompt: list[int], start: int) -> None:
    rig = make_rig(prefill_chunk=3)
    rig.directory.status["alora"] = AdapterReady("alora", 2, invocation=(8, 9))
    rig.add("activated", prompt, adapter="alora", max_tokens=3)
    rig.add("plain", prompt, adapter="a", max_tokens=3)
    starts: dict[str, set[int]] = {}
    for plan in rig.plans():
        for chunk in plan.chunks:
            starts.setdefault(chunk.sequence.request.request_id, set()).add(chunk.adapter_start)
    assert starts == {"activated": {start}, "plain": {0}}


def test_an_activated_adapter_that_is_not_invoked_takes_no_pages(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["alora"] = AdapterReady("alora", 10_000, invocation=(8, 9))
    rig.add("r", [9, 8, 1], adapter="alora", max_tokens=2)
    plans = list(rig.plans())
    assert not any(plan.page_ins or plan.failed for plan in plans)
    assert {chunk.adapters for plan in plans for chunk in plan.chunks} == {()}


def test_an_invocation_that_the_model_says_itself_does_not_count(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["alora"] = AdapterReady("alora", 2, invocation=(7, 7))
    rig.add("r", [7, 7, 1], adapter="alora", max_tokens=4)
    assert {chunk.adapter_start for plan in rig.plans() for chunk in plan.chunks} == {0}
