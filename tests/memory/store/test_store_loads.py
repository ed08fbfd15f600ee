"""The host store: loads once, and survives whatever a load does."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.memory.adapter_store import Absent, AdapterStore, Failed, Loading, Ready
from loraplex.memory.store_reading import bounded_reader


def test_an_adapter_becomes_ready_with_its_image(harness):
    store = harness.store()
    assert store.state("a", 0) == Absent()
    ready = harness.load(store, "a:3")
    assert ready.image.identity == "a"
    assert ready.image.data.shape == (1, 6, 128)
    assert ready.content == store.content("a:3", 0)
    assert (ready.content.num_pages, ready.content.num_bytes, ready.content.first_kv_layer) == (6, 3 * harness.unit, 1)
    assert (ready.rank, ready.targets, ready.warnings) == (3, ("q_proj",), ("a warning",))
    assert ready.seconds > 0
    assert store.host_bytes == 3 * harness.unit


def test_a_real_folder_is_read_verified_and_laid_out(harness, save_peft, base_shape):
    folder, _ = save_peft()
    reader = bounded_reader(read_source, base_shape, torch.bfloat16, 1 << 20, base_name="other")
    store = AdapterStore(base_shape, 256, torch.bfloat16, byte_limit=1 << 20, reader=reader)
    try:
        store.request(str(folder), 0)
        store.request(str(folder / "nowhere"), 0)
        harness.wait_until(lambda: store.stats.loading == 0)
        state, failed = store.state(str(folder), 0), store.state(str(folder / "nowhere"), 0)
        assert isinstance(state, Ready)
        assert state.image.data.dtype == torch.bfloat16
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, AdapterFileError)
    finally:
        store.close()


def test_values_beyond_the_served_dtype_fail_the_load(harness, save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(1e5))
    reader = bounded_reader(read_source, base_shape, torch.float16, 1 << 20)
    store = AdapterStore(base_shape, 256, torch.float16, byte_limit=1 << 20, reader=reader)
    try:
        store.request(str(folder), 0)
        harness.wait_until(lambda: store.stats.loading == 0)
        failed = store.state(str(folder), 0)
        assert isinstance(failed, Failed)
        assert "float16" in str(failed.error)
    finally:
        store.close()


def test_requests_while_loading_and_after_read_nothing_again(harness):
    store = harness.store()
    harness.reader.gate.clear()
    for _ in range(3):
        store.request("a", 0)
    assert store.state("a", 0) == Loading()
    harness.reader.gate.set()
    harness.load(store, "a")
    assert harness.reader.calls == ["a"]
    assert store.stats.loads == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_no_exception_of_a_load_ends_its_thread(error, harness):
    def read(path: str) -> AdapterSpec:
        if path == "bad":
            raise error
        return harness.spec_of(path)

    store = harness.store(threads=1, reader=read)
    failed = harness.load_any(store, "bad")
    assert failed.error is error
    assert isinstance(harness.load(store, "good"), Ready)


def test_a_failure_keeps_nothing_of_what_was_read(harness):
    references = []

    def read(path: str) -> AdapterSpec:
        spec = harness.spec_of(path)
        references.append(weakref.ref(spec.pairs[0].a))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise AdapterFileError("outer", key="k") from error

    store = harness.store(reader=read)
    harness.load_any(store, "a")
    store.close()
    gc.collect()
    assert references[0]() is None


def test_an_error_while_laying_out_returns_the_room(harness, monkeypatch):
    store = harness.store()

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError("no pages left to lock")

    monkeypatch.setattr("loraplex.memory.image_plan.build_image", fail)
    assert isinstance(harness.load_any(store, "a"), Failed)
    harness.wait_until(lambda: store.host_bytes == 0)
    store.check_integrity()


def test_a_load_that_is_forgotten_meanwhile_is_discarded(harness):
    store = harness.store(threads=1)
    harness.reader.gate.clear()
    store.request("a", 0)
    store.request("b", 0)
    harness.wait_until(lambda: harness.reader.active == ["a"])
    store.forget("a", 0)
    store.forget("b", 0)
    harness.reader.gate.set()
    harness.load(store, "c")
    assert store.state("a", 0) == store.state("b", 0) == Absent()
    assert store.host_bytes == harness.unit
    assert "b" not in harness.reader.calls


def test_a_path_forgotten_and_requested_again_is_read_again_but_never_twice_at_once(harness):
    store = harness.store(threads=2)
    harness.reader.gate.clear()
    store.request("a", 0)
    harness.wait_until(lambda: harness.reader.active == ["a"])
    store.forget("a", 0)
    store.request("a", 0)
    time.sleep(0.02)
    assert harness.reader.active == ["a"]
    harness.reader.gate.set()
    harness.load(store, "a")
    assert harness.reader.calls == ["a", "a"]
    assert harness.reader.overlaps == 0


def test_the_end_of_every_load_is_told_once_the_state_is_there(harness):
    seen = []
    store = harness.store(threads=1, on_change=lambda: seen.append((store.state("a", 0), store.state("!b", 0))))
    harness.load(store, "a")
    harness.load_any(store, "!b")
    store.close()
    assert [type(state) for state, _ in seen] == [Ready, Ready]
    assert len(seen) == 2
    assert isinstance(seen[1][1], Failed)


def test_a_listener_that_raises_ends_no_thread(harness):
    def shout() -> None:
        raise RuntimeError("deaf")

    store = harness.store(threads=1, on_change=shout)
    harness.load(store, "a")
    harness.load(store, "b")


def test_closing_joins_the_threads_whatever_they_wait_for(harness):
    before = threading.active_count()
    store = harness.store(units=1, threads=3)
    harness.load(store, "a")
    store.pin("a", 0)
    store.request("b", 0)
    store.request("c", 0)
    harness.wait_until(lambda: store.stats.waiting_for_room == 2)
    store.close()
    assert threading.active_count() == before
    assert isinstance(store.state("a", 0), Ready)


def test_two_loads_at_once_are_read_by_two_threads_and_the_first_asked_for_first(harness):
    store = harness.store(threads=2)
    harness.reader.gate.clear()
    for path in ("a", "b", "c"):
        store.request(path, 0)
    harness.wait_until(lambda: len(harness.reader.active) == 2)
    assert sorted(harness.reader.active) == ["a", "b"]
    assert (store.stats.loading, store.stats.misses) == (3, 3)


def test_what_is_logged_of_a_bug_keeps_nothing_of_what_was_read(harness, caplog):
    references = []

    def read(path: str) -> AdapterSpec:
        spec = harness.spec_of(path)
        references.append(weakref.ref(spec.pairs[0].a))
        raise ZeroDivisionError("a bug")

    harness.load_any(harness.store(reader=read), "a")
    assert "a bug" in caplog.text
    gc.collect()
    assert references[0]() is None
