from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex.server.adapter_directory import AdapterFailed, AdapterLoading, AdapterReady
from loraplex.server.errors import AdapterInvalidError, ContextLengthError, InvalidRequestError, OverloadedError

Make = Callable[..., Any]

TOKEN = 7


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused_with_the_numbers(make_rig: Make) -> None:
    rig = make_rig(max_model_len=10)
    rig.add("fits", 9)
    rig.add("scored only", 10, max_tokens=0)
    with pytest.raises(ContextLengthError, match=r"10 tokens and room for one more is needed, .* context is 10"):
        rig.add("full", 10)
    with pytest.raises(ContextLengthError, match="11 tokens, but the model's context is 10"):
        rig.add("over", 11, max_tokens=0)
    assert rig.scheduler.num_waiting == 2


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(make_rig: Make) -> None:
    rig = make_rig(num_pages=3)
    rig.add("fits", 12)
    with pytest.raises(ContextLengthError, match="13 tokens needs 4 pages, but the pool has 3"):
        rig.add("over", 13)


def test_an_empty_prompt_is_refused(make_rig: Make) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        make_rig().add("empty", 0)


def test_a_full_queue_refuses_new_requests(make_rig: Make) -> None:
    rig = make_rig(max_waiting=3)
    rig.add("a", n=2)
    rig.add("b", n=4)
    with pytest.raises(OverloadedError, match="6 sequences are waiting, and the limit is 3"):
        rig.add("c")


def test_an_adapter_larger_than_the_pool_fails_its_request_with_the_numbers(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.directory.status["big"] = AdapterReady("big", 5)
    rig.add("r", adapter="big", n=2)
    (failed,) = rig.scheduler.schedule().failed
    assert failed.error.name == "AdapterTooLargeError"
    assert failed.error.message == "Adapter 'big' needs 5 pages, but the pool has 4."
    assert not rig.scheduler.has_work
    assert not rig.directory.holds.total()


def test_an_adapter_that_leaves_no_room_for_the_prompt_fails_its_request(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("r", prompt=9, adapter="a")
    (failed,) = rig.scheduler.schedule().failed
    assert failed.error.name == "ContextLengthError"
    assert failed.error.message == ("The prompt of 9 tokens needs 3 pages and adapter 'a' needs 2, but the pool has 4.")


def test_what_fits_the_pool_exactly_runs_to_its_last_page(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("r", prompt=8, adapter="a", max_tokens=100)
    outputs = rig.drain()
    # The last token sampled needs no room: 8 tokens fit beside the adapter, the ninth is the answer.
    assert [output.token_ids for output in outputs] == [[TOKEN]]
    assert outputs[-1].finish_reason == "length"
    rig.add("shorter", prompt=6, adapter="a", max_tokens=100)
    assert len(rig.drain()) == 3


def test_the_first_output_carries_the_times(make_rig: Make) -> None:
    rig = make_rig()
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


def test_waiting_for_an_adapter_is_timed_from_its_first_lookup(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["a"] = AdapterLoading()
    rig.add("r", adapter="a", max_tokens=2)
    rig.now = 2.0
    rig.step()
    del rig.directory.status["a"]
    rig.now = 5.0
    first, second = rig.drain()
    assert (first.queue_seconds, first.adapter_load_seconds) == (5.0, 3.0)
    assert (second.queue_seconds, second.adapter_load_seconds) == (None, None)


def test_an_adapter_is_paged_in_once_for_all_who_use_it(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", adapter="a")
    rig.add("s", adapter="a")
    plan = rig.scheduler.schedule()
    assert [(page_in.identity, page_in.pages) for page_in in plan.page_ins] == [("a", rig.adapters.pages("a"))]
    assert [chunk.adapters for chunk in plan.chunks] == [(("a", 1.0),)] * 2
    rig.arrive()
    assert rig.adapters.pins("a") == 2
    rig.complete(plan)
    rig.drain()
    assert rig.adapters.num_evictable_pages == 2
    assert not rig.directory.holds.total()


def test_a_loading_adapter_holds_up_nobody_else(make_rig: Make) -> None:
    rig = make_rig()
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("slow", adapter="slow")
    rig.add("base")
    rig.add("fast", adapter="fast")
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["base", "fast"]


def test_those_who_waited_for_an_adapter_return_to_their_places(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("base", max_tokens=2)
    rig.add("slow", adapter="slow")
    rig.add("later")
    rig.step()
    del rig.directory.status["slow"]
    rig.step()
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["slow"]


def test_a_failed_load_fails_each_of_its_requests_once(make_rig: Make) -> None:
    rig = make_rig()
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


def test_only_so_many_adapters_load_at_once_and_the_line_goes_on(make_rig: Make) -> None:
    rig = make_rig(max_loading=2, look_ahead=2)
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


def test_many_who_wait_for_one_adapter_leave_the_line_to_others(make_rig: Make) -> None:
    rig = make_rig(look_ahead=2, max_running=2)
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("running", max_tokens=100)
    rig.step()
    for number in range(6):
        rig.add(str(number), adapter="slow")
    rig.add("base")
    for _ in range(4):
        rig.step()
    assert rig.scheduler.num_running == 2


def test_an_idle_step_looks_down_the_whole_line(make_rig: Make) -> None:
    rig = make_rig(look_ahead=2, max_loading=1)
    for name in "abcdef":
        rig.directory.status[name] = AdapterLoading()
        rig.add(name, adapter=name)
    rig.add("base")
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["base"]


def test_adapters_are_fetched_while_nobody_can_come_in(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    rig.add("running", max_tokens=100)
    rig.step()
    rig.add("r", adapter="a")
    rig.step()
    assert set(rig.directory.lookups) == {"a"}
    assert rig.directory.holds["a"]


def test_idle_adapters_give_way_before_a_sequence_does(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.add("r", adapter="a", max_tokens=1)
    rig.drain()
    assert rig.adapters.is_resident("a")
    rig.add("base", prompt=8, max_tokens=8)
    rig.drain()
    assert rig.scheduler.preemptions == 0
    assert not rig.adapters.is_resident("a")


def blocked_head(make_rig: Make, **limits: int) -> Any:
    """ "large" is first in line and does not fit beside "running"."""
    rig = make_rig(num_pages=10, **limits)
    rig.add("running", prompt=4, max_tokens=12)
    rig.step()
    rig.add("large", prompt=36, max_tokens=1)
    return rig


def test_one_who_does_not_fit_is_passed_only_so_often(make_rig: Make) -> None:
    rig = blocked_head(make_rig, max_passes=3)
    for number in range(6):
        rig.add(f"small {number}", max_tokens=1)
    plan = rig.scheduler.schedule()
    assert [name for name, *_ in rig.spans(plan)] == ["running", "small 0", "small 1", "small 2"]
    rig.complete(plan)
    assert [name for name, *_ in rig.spans(rig.scheduler.schedule())] == ["running"]


def test_one_who_does_not_fit_comes_in_when_the_others_are_done(make_rig: Make) -> None:
    rig = blocked_head(make_rig, max_passes=0)
    rig.add("small", max_tokens=1)
    order = [output.request_id for output in rig.drain()]
    assert order[-2:] == ["large", "small"]


def test_a_step_looks_only_so_far_down_the_line(make_rig: Make) -> None:
    rig = make_rig(look_ahead=5, max_running=1)
    rig.add("running", max_tokens=50)
    rig.step()
    for number in range(50):
        rig.add(str(number), adapter=f"adapter {number}")
    for _ in range(3):
        rig.step()
    assert set(rig.directory.lookups) == {f"adapter {number}" for number in range(5)}


def order_of_entry(rig: Any) -> list[str]:
    return [output.request_id for output in rig.drain() if output.finish_reason]


def test_who_hopes_for_a_first_token_soon_comes_in_before_the_others(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    for name, within in (("silent", None), ("patient", 30.0), ("urgent", 0.5), ("most urgent", 0.1), ("last", None)):
        rig.add(name, max_tokens=1, n=2 if name == "urgent" else 1, first_token_within=within)
    assert order_of_entry(rig) == ["most urgent", "urgent", "urgent", "silent", "last", "patient"]


def test_nobody_who_is_silent_waits_for_those_who_came_more_than_two_seconds_later(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    rig.add("silent", max_tokens=1)
    rig.add("patient", max_tokens=1, first_token_within=1e9)
    rig.now = 1.9
    rig.add("urgent", max_tokens=1, first_token_within=0.01)
    rig.now = 2.0
    rig.add("too late", max_tokens=1, first_token_within=0.01)
    rig.now = 60.0
    rig.add("much later", max_tokens=1, first_token_within=0.01)
    assert order_of_entry(rig) == ["urgent", "silent", "too late", "patient", "much later"]


def test_who_stands_aside_for_an_adapter_returns_to_its_place(make_rig: Make) -> None:
    rig = make_rig(max_running=1)
    rig.directory.status["slow"] = AdapterLoading()
    rig.add("running", max_tokens=2)
    rig.step()
    rig.add("urgent", adapter="slow", max_tokens=1, first_token_within=0.1)
    rig.add("silent", max_tokens=1)
    rig.add("other", max_tokens=1, first_token_within=0.2)
    rig.step()
    rig.directory.status["slow"] = AdapterReady("slow", 1)
    assert order_of_entry(rig)[-3:] == ["urgent", "other", "silent"]
