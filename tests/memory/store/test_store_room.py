"""The host store's budget: who shares an image, who goes for whom, and who waits."""

from __future__ import annotations

import weakref

import pytest
import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import TokenRoutes
from loraplex.memory.adapter_store import Absent, Loading, Ready
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import ValueOrder
from loraplex.memory.store_read_times import ReadTimes
from loraplex.memory.store_states import KindUse


def test_two_registrations_of_one_content_share_the_image_and_its_bytes(harness):
    store = harness.store()
    one, other = harness.load(store, "a", 0), harness.load(store, "a", 1)
    assert one.image is other.image
    assert store.host_bytes == harness.unit
    store.forget("a", 0)
    assert store.state("a", 1) == other
    store.forget("a", 1)
    assert store.stats.images == 0
    del one, other
    harness.wait_until(lambda: store.host_bytes == 0)


def test_one_content_read_twice_at_once_is_laid_out_once(harness):
    store = harness.store(units=1, threads=4)
    harness.reader.gate.clear()
    for revision in range(4):
        store.request("a", revision)
    harness.wait_until(lambda: len(harness.reader.active) == 4)
    harness.reader.gate.set()
    harness.wait_until(lambda: store.stats.loading == 0)
    images = {id(store.state("a", revision).image) for revision in range(4)}
    assert len(images) == 1
    assert store.host_bytes == harness.unit


def test_the_least_recently_used_image_makes_room(harness):
    store = harness.store(units=3)
    for path in ("a", "b", "c"):
        harness.load(store, path)
    store.request("a", 0)
    harness.load(store, "d")
    assert store.state("b", 0) == Absent()
    assert isinstance(store.state("a", 0), Ready)
    assert store.stats.evictions == 1


def test_a_pinned_image_stays(harness):
    store = harness.store(units=2)
    harness.load(store, "a")
    store.pin("a", 0)
    harness.load(store, "b")
    harness.load(store, "c")
    assert isinstance(store.state("a", 0), Ready)
    assert store.state("b", 0) == Absent()


def test_a_load_waits_for_room_until_a_pin_is_lifted(harness):
    store = harness.store(units=2)
    harness.load(store, "a:2")
    store.pin("a:2", 0)
    store.request("b", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    assert store.state("b", 0) == Loading()
    assert store.host_bytes == 2 * harness.unit
    store.unpin("a:2", 0)
    assert isinstance(harness.load(store, "b"), Ready)
    assert store.state("a:2", 0) == Absent()


def test_making_room_evicts_nothing_when_it_cannot_suffice(harness):
    store = harness.store(units=3)
    harness.load(store, "a:2")
    store.pin("a:2", 0)
    harness.load(store, "b")
    store.request("c:2", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    assert isinstance(store.state("b", 0), Ready)


def test_an_image_above_the_whole_budget_fails_with_the_numbers(harness):
    store = harness.store(units=3)
    state = harness.load_any(store, "a:4")
    assert isinstance(state.error, AdapterFileError)
    assert state.error.key == "bytes"
    assert str(4 * harness.unit) in state.error.message
    assert str(3 * harness.unit) in state.error.message
    harness.wait_until(lambda: store.host_bytes == 0)


def test_forgetting_while_waiting_for_room_ends_the_wait(harness):
    store = harness.store(units=1)
    harness.load(store, "a")
    store.pin("a", 0)
    store.request("b", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    store.forget("b", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 0)
    assert store.state("b", 0) == Absent()


def test_a_pinned_adapter_is_forgotten_at_its_last_unpin(harness):
    store = harness.store()
    harness.load(store, "a")
    store.pin("a", 0)
    store.pin("a", 0)
    store.forget("a", 0)
    store.unpin("a", 0)
    assert isinstance(store.state("a", 0), Ready)
    store.unpin("a", 0)
    assert store.state("a", 0) == Absent()
    harness.wait_until(lambda: store.host_bytes == 0)


def test_a_request_takes_a_forgotten_pinned_adapter_back(harness):
    store = harness.store()
    harness.load(store, "a")
    store.pin("a", 0)
    store.forget("a", 0)
    store.request("a", 0)
    store.unpin("a", 0)
    assert isinstance(store.state("a", 0), Ready)


@pytest.mark.parametrize("prepare", [lambda store: None, lambda store: store.request("!x", 0)])
def test_only_what_is_ready_can_be_pinned(prepare, harness):
    store = harness.store()
    prepare(store)
    with pytest.raises(KeyError, match="not ready"):
        store.pin("!x", 0)


def test_the_memory_of_an_image_is_not_given_to_others_while_somebody_reads_it(harness):
    store = harness.store(units=2)
    image = harness.load(store, "a:2").image
    before = image.data.clone()
    store.request("b:2", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    assert store.state("a:2", 0) == Absent()
    assert store.host_bytes == 2 * harness.unit
    assert torch.equal(image.data, before)
    del image
    assert isinstance(harness.load(store, "b:2"), Ready)


def test_others_stay_while_the_memory_of_one_that_left_will_do(harness, monkeypatch):
    monkeypatch.setattr("loraplex.memory.adapter_store._PATIENCE", 30.0)
    store = harness.store(units=3)
    image = harness.load(store, "a").image
    harness.load(store, "b")
    harness.load(store, "c")
    store.request("d", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    assert store.state("a", 0) == Absent()
    assert isinstance(store.state("b", 0), Ready)
    del image
    assert isinstance(harness.load(store, "d"), Ready)
    assert isinstance(store.state("b", 0), Ready)


def test_others_go_where_somebody_reads_on_and_on(harness):
    store = harness.store(units=2)
    image = harness.load(store, "a").image
    harness.load(store, "b")
    assert isinstance(harness.load(store, "c"), Ready)
    assert store.state("b", 0) == Absent()
    assert image.data.any()


def test_an_image_that_left_is_let_go_by_the_store(harness):
    store = harness.store(units=1)
    watched = weakref.ref(harness.load(store, "a").image.parts[0])
    harness.load(store, "b")
    harness.wait_until(lambda: watched() is None)


def value_store(harness, monkeypatch, seconds=None, **options):
    """Rates of a store that goes by value, and the store; each read takes as long as ``seconds`` says, else 1."""
    monkeypatch.setattr(ReadTimes, "seconds_of", lambda self, identity, size=None: (seconds or {}).get(identity, 1.0))
    rates = ArrivalRates(clock=lambda: harness.now)
    return rates, harness.store(rates=rates, order=ValueOrder(), **options)


def test_what_is_wanted_least_often_makes_room_where_value_counts(harness, monkeypatch):
    rates, store = value_store(harness, monkeypatch, units=2)
    for identity in ("a", "a", "a", "b"):
        rates.note(identity)
    harness.load(store, "a")
    harness.load(store, "b")
    harness.load(store, "c")
    assert isinstance(store.state("a", 0), Ready)
    assert store.state("b", 0) == Absent()


def test_a_request_counts_the_arrivals_since(harness, monkeypatch):
    rates, store = value_store(harness, monkeypatch, units=2)
    rates.note("a")
    harness.load(store, "a")
    for _ in range(2):
        rates.note("b")
    harness.load(store, "b")
    for _ in range(1000):
        rates.note("a")
    store.request("a", 0)
    harness.load(store, "c")
    assert isinstance(store.state("a", 0), Ready)


def test_what_takes_longest_to_read_stays_where_value_counts(harness, monkeypatch):
    seconds = {"a": 5.0, "b": 0.1, "c": 1.0}
    rates, store = value_store(harness, monkeypatch, seconds, units=2)
    for identity in seconds:
        rates.note(identity)
        harness.load(store, identity)
    assert isinstance(store.state("a", 0), Ready)
    assert store.state("b", 0) == Absent()


def test_reading_times_are_those_measured_else_those_of_late(harness):
    store = harness.store()
    assert store.seconds_to_read("a") > 0
    seconds = harness.load(store, "a").seconds
    assert store.seconds_to_read("a") == seconds
    assert store.seconds_to_read("unknown", harness.unit) == pytest.approx(seconds)
    assert store.seconds_to_read("unknown", 2 * harness.unit) == pytest.approx(2 * seconds)
    assert store.seconds_to_read("unknown") == pytest.approx(seconds)
    assert store.take_recent() == [seconds]
    assert store.take_recent() == []


def test_the_statistics_tell_kinds_hits_and_why_images_left(harness):
    store = harness.store(units=2)
    harness.load(store, "a")
    harness.load(store, "a")
    harness.load(store, "b")
    harness.load(store, "c")
    store.forget("c", 0)
    stats = store.stats
    assert (stats.hits, stats.misses, stats.loads) == (1, 3, 3)
    assert stats.evictions_by_reason == {"room": 1, "forgotten": 1}
    assert stats.evictions == 1
    assert stats.by_kind == {"lora": KindUse(1, harness.unit)}
    harness.wait_until(lambda: store.free_bytes == harness.unit)  # the loader thread lets go in a moment


def test_routes_by_token_count_in_the_budget(harness):
    routes = TokenRoutes(torch.zeros(100, 1, dtype=torch.int16), torch.zeros(100, 1))  # 600 bytes
    store = harness.store(units=3, reader=lambda path: harness.spec_of(path, routes=routes if path == "a" else None))
    ready = harness.load(store, "a")
    assert ready.content.num_bytes == store.host_bytes == harness.unit + 600
    assert ready.content.routes_by_token
    del ready
    harness.load(store, "b")
    harness.load(store, "c")
    assert store.state("a", 0) == Absent()
    harness.wait_until(lambda: store.host_bytes == 2 * harness.unit)


def test_moves_tell_which_contents_came_and_went(harness):
    store = harness.store(units=1)
    harness.load(store, "a")
    assert store.take_moves() == {"a"}
    harness.load(store, "b")
    assert store.take_moves() == {"a", "b"}
    harness.load(store, "b/copy")
    assert store.take_moves() == set()
    store.forget("b", 0)
    assert store.take_moves() == set()
    store.forget("b/copy", 0)
    assert store.take_moves() == {"b"}


def test_nothing_goes_in_vain_where_pinned_images_leave_no_run_of_blocks(harness):
    store = harness.store(units=6)
    for path in "abcdef":
        harness.load(store, path)
    for path in "ace":
        store.pin(path, 0)
    store.request("big:3", 0)  # as many blocks as the idle ones have, but one layer must be one run
    harness.wait_until(lambda: store.stats.waiting_for_room == 1)
    assert all(isinstance(store.state(path, 0), Ready) for path in "abcdef")
    for path in "ace":
        store.unpin(path, 0)
    assert isinstance(harness.load(store, "big:3"), Ready)


def test_what_has_just_been_read_outlives_what_was_wanted_long_ago(harness, monkeypatch):
    rates, store = value_store(harness, monkeypatch, units=2)
    rates.note("old")
    harness.load(store, "old")
    harness.now += 1000.0
    harness.load(store, "first")  # whom nobody could count: its identity was not known
    harness.load(store, "second")
    assert store.state("old", 0) == Absent()
    assert isinstance(store.state("first", 0), Ready)


@pytest.mark.parametrize("by_value", [False, True])
def test_what_is_held_stays_from_the_moment_it_is_read(harness, monkeypatch, by_value):
    store = value_store(harness, monkeypatch, units=2)[1] if by_value else harness.store(units=2)
    store.hold("a", 0)
    store.hold("a", 0)
    for path in ("a", "b", "c", "d"):
        harness.load(store, path)
    assert isinstance(store.state("a", 0), Ready)
    assert store.held.has_pinned(("a", 0))
    store.release("a", 0)
    harness.load(store, "e")
    assert isinstance(store.state("a", 0), Ready)
    store.release("a", 0)
    assert ("a", 0) not in store.held
    for path in ("f", "g"):
        harness.load(store, path)
    assert store.state("a", 0) == Absent()


def test_what_is_held_when_it_is_here_already_stays_once_it_is_secured(harness):
    store = harness.store(units=2)
    harness.load(store, "a")
    assert store.secure("a", 0)
    assert not store.held.has_pinned(("a", 0)), "nobody holds it"
    store.hold("a", 0)
    assert store.secure("a", 0)
    for path in ("b", "c"):
        harness.load(store, path)
    assert isinstance(store.state("a", 0), Ready)
    store.hold("b", 0)
    assert not store.secure("b", 0), "it has gone"
    assert store.held.pinned == (("a", 0),)


def test_what_is_forgotten_while_it_is_held_goes_with_the_last_hold(harness):
    store = harness.store(units=2)
    store.hold("a", 0)
    harness.load(store, "a")
    store.forget("a", 0)
    assert isinstance(store.state("a", 0), Ready)
    store.release("a", 0)
    assert store.state("a", 0) == Absent()
    assert store.stats.images == 0


def test_a_hold_outlives_a_registration_that_is_forgotten_while_it_loads(harness):
    store = harness.store(units=2)
    harness.reader.gate.clear()
    store.hold("a", 0)
    store.request("a", 0)
    store.forget("a", 0)
    harness.reader.gate.set()
    harness.load(store, "a")
    assert store.held.has_pinned(("a", 0))
    store.release("a", 0)
    assert not store.held.has_pinned(("a", 0))
