"""A registration keeps its content: what was read first is what is served, or nothing."""

from __future__ import annotations

import pytest

from loraplex.memory.adapter_errors import AdapterChangedError, AdapterFileError
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_store import Absent, Failed, Loading, Ready
from loraplex.memory.store_records import Records
from loraplex.memory.store_states import Failed as FailedState


def evict(harness, store) -> None:
    harness.load(store, "filler:10")


def test_content_stays_known_when_the_image_has_gone(harness):
    store = harness.store()
    assert store.content("a", 0) is None
    known = harness.load(store, "a").content
    evict(harness, store)
    assert store.state("a", 0) == Absent()
    assert store.content("a", 0) == known
    store.forget("a", 0)
    assert store.content("a", 0) is None


def test_files_that_have_changed_are_not_served_under_the_old_registration(harness):
    store = harness.store()
    known = harness.load(store, "a").content
    evict(harness, store)
    harness.reader.swapped["a"] = "other"
    failed = harness.load_any(store, "a")
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, AdapterChangedError)
    assert isinstance(failed.error, AdapterFileError)
    assert "load the adapter again" in failed.error.message
    assert store.content("a", 0) == known
    assert not store.holds("other")
    assert harness.load(store, "a", 1).image.identity == "other"


def test_files_that_are_as_they_were_are_served_again(harness):
    store = harness.store()
    harness.load(store, "a")
    evict(harness, store)
    harness.reader.swapped["a"] = "other"
    harness.load_any(store, "a")
    del harness.reader.swapped["a"]
    harness.now += 60
    assert harness.load(store, "a").image.identity == "a"


def test_an_expectation_holds_before_the_first_read(harness):
    store = harness.store()
    store.expect("a", 0, "other")
    assert isinstance(harness.load_any(store, "a").error, AdapterChangedError)
    store.expect("b", 0, "b")
    assert harness.load(store, "b").image.identity == "b"


def test_a_changed_expectation_lets_other_content_go(harness):
    store = harness.store()
    harness.load(store, "a")
    store.expect("a", 0, "other")
    assert store.state("a", 0) == Absent()
    assert store.stats.evictions_by_reason == {"changed": 1}
    harness.reader.swapped["a"] = "other"
    assert harness.load(store, "a").image.identity == "other"


def test_pinned_content_goes_at_its_last_unpin_when_another_is_expected(harness):
    store = harness.store()
    harness.load(store, "a")
    harness.load(store, "a/copy")
    store.pin("a", 0)
    store.expect("a", 0, "other")
    assert isinstance(store.state("a", 0), Ready)
    store.unpin("a", 0)
    assert store.state("a", 0) == Absent()
    assert store.holds("a"), "the other registration still has it"


def test_an_expectation_that_changes_during_the_load_counts(harness):
    store = harness.store()
    harness.reader.gate.clear()
    store.request("a", 0)
    store.expect("a", 0, "other")
    harness.reader.gate.set()
    assert isinstance(harness.load_any(store, "a"), Failed)


def test_an_expectation_that_changes_while_the_image_is_laid_out_counts(harness, monkeypatch):
    store = harness.store()

    def build(*args, **options):
        store.expect("a", 0, "other")
        return build_image(*args, **options)

    monkeypatch.setattr("loraplex.memory.image_plan.build_image", build)
    assert isinstance(harness.load_any(store, "a").error, AdapterChangedError)
    harness.wait_until(lambda: store.host_bytes == 0)
    assert not store.holds("a")


def test_changes_tell_every_registration_whose_state_is_new(harness):
    store = harness.store()
    harness.reader.gate.clear()
    store.request("a", 0)
    assert store.take_changes() == {("a", 0)}
    harness.reader.gate.set()
    harness.load(store, "a")
    assert store.take_changes() == {("a", 0)}
    harness.load(store, "a")
    assert store.take_changes() == set()
    harness.load_any(store, "!b")
    assert store.take_changes() == {("!b", 0)}
    evict(harness, store)
    assert store.take_changes() == {("a", 0), ("filler:10", 0)}
    harness.load(store, "a")
    store.forget("a", 0)
    assert store.take_changes() == {("filler:10", 0)}


@pytest.mark.parametrize("state", [Absent(), FailedState(ValueError(), 0.0, 1.0)])
def test_only_so_many_registrations_that_are_not_here_are_remembered(state):
    records = Records(max_dormant=3)
    for i in range(5):
        record = records.obtain((f"{i}", 0))
        records.set_state(record, Loading())
        records.set_state(record, state)
        records.check_integrity()
    assert [records.find((f"{i}", 0)) is not None for i in range(5)] == [False, False, True, True, True]
    assert records.take_changes() == {("2", 0), ("3", 0), ("4", 0)}
