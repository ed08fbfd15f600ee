"""What the engine tells of when things happened to a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplex.server.errors import AdapterInvalidError
from loraplex.server.scheduler import AdapterFailed, AdapterLoading, AdapterReady, SampledToken
from loraplex.server.span_times import AdapterLoad, AdapterUse, BeginTimes, EndTimes, FailTimes

Make = Callable[..., Any]


def test_the_first_output_of_a_request_tells_its_times_once(make_rig: Make) -> None:
    rig = make_rig()
    rig.now = 10.0
    rig.add("r", n=2, max_tokens=2)
    rig.now = 11.0
    plan = rig.scheduler.schedule()
    rig.now = 12.0
    outputs = rig.complete(plan)
    rig.now = 13.0
    outputs += rig.drain()
    assert [output.began for output in outputs if output.began] == [BeginTimes(10.0, 11.0, 12.0)]
    assert outputs[0].began is not None
    assert [output.over for output in outputs if output.over] == [EndTimes(13.0)] * 2
    assert all((output.over is None) == (output.finish_reason is None) for output in outputs)


def test_what_was_loaded_for_a_request_is_told_with_it(make_rig: Make) -> None:
    rig = make_rig()
    rig.now = 10.0
    rig.directory.status["a"] = AdapterLoading()
    rig.add("r", adapter="a", max_tokens=1)
    assert not rig.step()
    loads = (AdapterLoad("remote", "disk", 8.0, 9.5, 512), AdapterLoad("disk", "host", 9.5, 10.5, 512))
    rig.directory.status["a"] = AdapterReady("identity", 2, kind="dora", num_bytes=512, loads=loads)
    rig.now = 11.0
    plan = rig.scheduler.schedule()
    rig.now = 11.5
    rig.scheduler.page_ins.note_copied("identity")
    rig.now = 12.0
    [output] = rig.complete(plan)
    copy = AdapterLoad("host", "pool", 11.0, 11.5, 512)
    # What was fetched before the request came is not its own.
    assert output.began.adapters == [AdapterUse("a", "identity", "dora", [loads[1], copy])]


def test_what_was_at_hand_is_told_without_loads(make_rig: Make) -> None:
    rig = make_rig()
    loads = (AdapterLoad("disk", "host", 0.0, 99.0, 512),)
    rig.directory.status["a"] = AdapterReady("a", 2, loads=loads)
    for name in ("first", "second"):
        rig.add(name, adapter="a", max_tokens=1)
        [output] = rig.drain()
        copied = [AdapterLoad("host", "pool", 0.0, 0.0)] if name == "first" else []
        assert output.began.adapters == [AdapterUse("a", "a", "", copied)]


def test_a_copy_that_is_still_under_way_has_no_end(make_rig: Make) -> None:
    rig = make_rig()
    rig.add("r", adapter="a", max_tokens=1)
    plan = rig.scheduler.schedule()
    sampled = {chunk.sequence.seq_id: SampledToken(7) for chunk in plan.chunks}
    [output] = rig.scheduler.complete(plan, sampled)
    assert output.began.adapters[0].loads == [AdapterLoad("host", "pool", 0.0, None)]


def test_a_choice_tells_at_its_end_when_it_was_preempted(make_rig: Make) -> None:
    rig = make_rig(num_pages=5)
    rig.add("old", prompt=4, max_tokens=12)
    rig.add("young", prompt=4, max_tokens=8)
    outputs = []
    while not rig.scheduler.preemptions:
        rig.now += 1.0
        outputs += rig.step()
    at = rig.now
    rig.now += 1.0
    ends = {output.request_id: output.over for output in outputs + rig.drain() if output.over}
    assert ends["young"].preempted == [at]
    assert ends["old"].preempted == []


def test_a_load_that_fails_is_named_with_the_failure(make_rig: Make) -> None:
    rig = make_rig()
    rig.now = 10.0
    rig.directory.status["bad"] = AdapterLoading()
    rig.add("r", adapter="bad")
    rig.now = 11.0
    rig.step()
    rig.directory.status["bad"] = AdapterFailed(AdapterInvalidError("no"))
    rig.now = 12.0
    [failed] = rig.scheduler.schedule().failed
    assert failed.times == FailTimes(10.0, 12.0, "bad", 11.0)


def test_another_failure_names_no_adapter(make_rig: Make) -> None:
    rig = make_rig(num_pages=4)
    rig.directory.status["big"] = AdapterReady("big", 5)
    rig.add("r", adapter="big")
    [failed] = rig.scheduler.schedule().failed
    assert failed.times.adapter is None
