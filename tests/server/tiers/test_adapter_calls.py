"""Calls about adapters that cross one another, failures and requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from loraplex.server.messages import (
    AdapterRef,
    CallDone,
    CallFailed,
    Event,
    Generate,
    LoadAdapter,
    OutputBatch,
    PinAdapter,
    PrefetchAdapter,
    RestoreAdapters,
    RestoredAdapter,
    SamplingParams,
    UnloadAdapter,
    WeightedAdapter,
)

A, B, C = (f"/adapters/{name}" for name in "abc")
REF = AdapterRef(name="a", path=A, revision=5)
Make = Callable[..., Any]


def ask(ref: AdapterRef, name: str = "r", tokens: int = 1, mix: tuple[WeightedAdapter, ...] = ()) -> Generate:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    adapter = None if mix else ref
    return Generate(request_id=name, prompt_ids=[1, 2, 3, 4], params=params, adapter=adapter, mix=mix)


def run(tiers: Any, is_over: Callable[[list[Event]], object], seconds: float = 10.0) -> list[Event]:
    deadline, events = time.monotonic() + seconds, []
    while not is_over(events):
        events += tiers.engine.step()
        time.sleep(0.0005)
        assert time.monotonic() < deadline, "what is waited for does not come"
    return events


def ended(events: list[Event]) -> dict[str, bool]:
    """Requests that are over, and whether they failed."""
    batches = [event for event in events if isinstance(event, OutputBatch)]
    done = {output.request_id: False for batch in batches for output in batch.outputs if output.finish_reason}
    return done | {failure.request_id: True for batch in batches for failure in batch.failed}


def answers(events: list[Event]) -> dict[str, bool]:
    """Calls that were answered, and whether they failed."""
    return {
        event.call_id: isinstance(event, CallFailed) for event in events if isinstance(event, CallDone | CallFailed)
    }


def test_a_failed_load_of_a_known_name_keeps_the_identity_that_it_must_have(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.engine.handle(RestoreAdapters(adapters=[RestoredAdapter(adapter=REF, identity=f"{A} 0")]))
    tiers.files.content[A] = 1
    tiers.engine.handle(LoadAdapter(call_id="load", adapter=REF))
    assert answers(run(tiers, answers)) == {"load": True}
    tiers.engine.handle(ask(REF))
    assert ended(run(tiers, ended)) == {"r": True}
    tiers.files.content[A] = 0
    tiers.engine.handle(LoadAdapter(call_id="again", adapter=REF))
    assert answers(run(tiers, answers)) == {"again": False}, "an explicit load does not wait for the back-off"


def test_a_prefetch_under_way_does_not_bring_back_what_is_unloaded(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.files.gate.clear()
    tiers.engine.handle(PrefetchAdapter(call_id="prefetch", adapter=REF))
    tiers.engine.step()
    tiers.engine.handle(UnloadAdapter(call_id="unload", adapter=REF))
    assert answers(tiers.engine.step()) == {"prefetch": True, "unload": False}
    tiers.files.gate.set()
    run(tiers, lambda events: not tiers.engine.has_work)
    assert tiers.directory.info(REF) is None
    assert not tiers.tiers.adapters.resident


def test_a_pin_under_way_does_not_pin_what_is_unloaded(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.files.gate.clear()
    tiers.engine.handle(PinAdapter(call_id="pin", adapter=REF))
    tiers.engine.step()
    tiers.engine.handle(UnloadAdapter(call_id="unload", adapter=REF))
    tiers.files.gate.set()
    run(tiers, lambda events: not tiers.engine.has_work)
    assert not tiers.is_pinned(REF)


def test_a_request_that_comes_just_after_the_unload_leaves_nothing_behind(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.engine.handle(LoadAdapter(call_id="load", adapter=REF))
    run(tiers, answers)
    tiers.engine.handle(UnloadAdapter(call_id="unload", adapter=REF))
    tiers.engine.step()
    tiers.engine.handle(ask(REF))
    assert ended(run(tiers, ended)) == {"r": False}
    run(tiers, lambda events: not tiers.engine.has_work)
    assert tiers.directory.info(REF) is None


def test_a_restored_pin_outlives_a_first_read_that_fails(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.files.broken.add(A)
    tiers.engine.handle(RestoreAdapters(adapters=[RestoredAdapter(adapter=REF, identity=f"{A} 0", pinned=True)]))
    run(tiers, lambda events: tiers.tiers.store.stats.failures)
    tiers.files.broken.clear()
    tiers.now += 100.0
    run(tiers, lambda events: tiers.is_pinned(REF))


def test_a_restored_pin_for_which_there_is_no_room_any_more_is_given_up(make_tiers: Make) -> None:
    tiers = make_tiers(pages=14)
    refs = [AdapterRef(name=path, path=path, revision=5) for path in (A, B, C)]
    tiers.engine.handle(RestoreAdapters(adapters=[RestoredAdapter(adapter=ref, pinned=True) for ref in refs]))
    run(tiers, lambda events: not tiers.engine.has_work)
    assert [tiers.is_pinned(ref) for ref in refs] == [True, True, False]
    assert not len(tiers.tiers.store.held)


def test_a_pin_outlives_a_twin_of_the_same_bytes_that_is_unloaded(make_tiers: Make) -> None:
    tiers = make_tiers()
    tiers.files.identity = lambda path: f"{A} 0"
    old, new = (AdapterRef(name=name, path=A, revision=revision) for name, revision in (("x", 1), ("y", 2)))
    tiers.engine.handle(ask(old, tokens=30))
    run(tiers, lambda events: tiers.scheduler.num_running)
    tiers.let_the_host_forget()
    tiers.engine.handle(UnloadAdapter(call_id="unload", adapter=old))
    tiers.engine.handle(PinAdapter(call_id="pin", adapter=new))
    run(tiers, lambda events: not tiers.engine.has_work)
    assert tiers.is_pinned(new)
    assert tiers.tiers.adapters.is_kept(f"{A} 0")


def test_what_is_wanted_often_comes_back_and_what_cannot_be_read_is_passed_over(make_tiers: Make) -> None:
    tiers = make_tiers()
    for path, count in ((A, 5), (B, 2)):
        for number in range(count):
            tiers.engine.handle(ask(AdapterRef(name=path, path=path, revision=1), f"{path}{number}"))
            run(tiers, lambda events: not tiers.engine.has_work)
    tiers.let_the_host_forget()
    for path in (A, B):
        tiers.tiers.adapters.drop(f"{path} 0")
    tiers.files.broken.add(A)
    history = tiers.engine._parts.history

    def look(events: list[Event]) -> bool:
        history._next_at = 0.0
        return bool(tiers.tiers.adapters.is_resident(f"{B} 0"))

    run(tiers, look)


def test_a_mix_is_not_given_up_because_another_load_finds_no_room(make_tiers: Make) -> None:
    tiers = make_tiers(units=6)
    mix = tuple(WeightedAdapter(adapter=AdapterRef(name=path, path=path), weight=0.5) for path in (A, B))
    tiers.engine.handle(LoadAdapter(call_id="a", adapter=mix[0].adapter))
    run(tiers, answers)
    tiers.files.gate.clear()
    tiers.engine.handle(ask(REF, "mix", mix=mix))
    for _ in range(20):
        events = tiers.engine.step()
        tiers.now += 1.0
        assert not ended(events)
    tiers.files.gate.set()
    assert ended(run(tiers, ended)) == {"mix": False}
