"""The host store: loads once, within its budget, and survives whatever a load does."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, LowRankPair
from loraplex.memory.adapter_store import Absent, AdapterStore, Failed, Loading, Ready

SHAPE = BaseShape(1, {"q_proj": (128, 128)}, {})
UNIT = 2 * 128 * 4
"""Bytes of an image of rank 1: a row of A and one of B in float32."""


def spec_of(identity: str, rank: int = 1) -> AdapterSpec:
    pair = LowRankPair("q_proj", 0, torch.ones(rank, 128), torch.ones(128, rank), 1.0)
    return AdapterSpec(identity, "lora", (pair,), ("a warning",))


class FakeReader:
    """Reads paths such as "name", "name:rank" or "name:rank/copy"; one that starts with "!" fails.

    Can be held up, and notes what it reads.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.active: list[str] = []
        self.overlaps = 0

    def __call__(self, path: str) -> AdapterSpec:
        self.calls.append(path)
        self.overlaps += path in self.active
        self.active.append(path)
        try:
            assert self.gate.wait(30)
        finally:
            self.active.remove(path)
        if path.startswith("!"):
            raise AdapterFileError(f"{path} is broken", key="tensor")
        name, _, rank = path.partition("/")[0].partition(":")
        return spec_of(name, int(rank or 1))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.0005)


class Harness:
    """Stores over a fake reader and a clock of ours."""

    def __init__(self) -> None:
        self.reader = FakeReader()
        self.now = 100.0
        self.stores: list[AdapterStore] = []

    def store(self, *, units: int = 10, **options: Any) -> AdapterStore:
        options = {"reader": self.reader, "clock": lambda: self.now, **options}
        store = AdapterStore(SHAPE, 128, torch.float32, byte_limit=units * UNIT, **options)
        self.stores.append(store)
        return store

    def load(self, store: AdapterStore, path: str, revision: int = 0) -> Ready:
        state = self.load_any(store, path, revision)
        assert isinstance(state, Ready)
        return state

    def load_any(self, store: AdapterStore, path: str, revision: int = 0) -> Any:
        store.request(path, revision)
        wait_until(lambda: not isinstance(store.state(path, revision), Loading))
        return store.state(path, revision)

    def close(self) -> None:
        self.reader.gate.set()
        for store in self.stores:
            store.close()
            store.check_integrity()


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


def test_an_adapter_becomes_ready_with_its_image(harness):
    store = harness.store()
    assert store.state("a", 0) == Absent()
    ready = harness.load(store, "a:3")
    assert ready.image.identity == "a"
    assert ready.image.data.shape == (1, 6, 128)
    assert (ready.rank, ready.targets, ready.warnings) == (3, ("q_proj",), ("a warning",))
    assert ready.seconds > 0
    assert store.host_bytes == 3 * UNIT


def test_a_real_folder_is_read_verified_and_laid_out(save_peft, base_shape):
    folder, _ = save_peft()
    store = AdapterStore(base_shape, 256, torch.bfloat16, byte_limit=1 << 20, base_name="other")
    try:
        store.request(str(folder), 0)
        store.request(str(folder / "nowhere"), 0)
        wait_until(lambda: store.stats.loading == 0)
        state, failed = store.state(str(folder), 0), store.state(str(folder / "nowhere"), 0)
        assert isinstance(state, Ready)
        assert state.image.data.dtype == torch.bfloat16
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, AdapterFileError)
    finally:
        store.close()


def test_values_beyond_the_served_dtype_fail_the_load(save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(1e5))
    store = AdapterStore(base_shape, 256, torch.float16, byte_limit=1 << 20)
    try:
        store.request(str(folder), 0)
        wait_until(lambda: store.stats.loading == 0)
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


def test_two_registrations_of_one_content_share_the_image_and_its_bytes(harness):
    store = harness.store()
    one, other = harness.load(store, "a", 0), harness.load(store, "a", 1)
    assert one.image is other.image
    assert store.host_bytes == UNIT
    store.forget("a", 0)
    assert store.state("a", 1) == other
    store.forget("a", 1)
    assert store.host_bytes == 0


def test_one_content_read_twice_at_once_is_laid_out_once(harness):
    store = harness.store(units=1, threads=4)
    harness.reader.gate.clear()
    for revision in range(4):
        store.request("a", revision)
    wait_until(lambda: len(harness.reader.active) == 4)
    harness.reader.gate.set()
    wait_until(lambda: store.stats.loading == 0)
    images = {id(store.state("a", revision).image) for revision in range(4)}
    assert len(images) == 1
    assert store.host_bytes == UNIT


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
    wait_until(lambda: store.stats.waiting_for_room == 1)
    assert store.state("b", 0) == Loading()
    assert store.host_bytes == 2 * UNIT
    store.unpin("a:2", 0)
    assert isinstance(harness.load(store, "b"), Ready)
    assert store.state("a:2", 0) == Absent()


def test_making_room_evicts_nothing_when_it_cannot_suffice(harness):
    store = harness.store(units=3)
    harness.load(store, "a:2")
    store.pin("a:2", 0)
    harness.load(store, "b")
    store.request("c:2", 0)
    wait_until(lambda: store.stats.waiting_for_room == 1)
    assert isinstance(store.state("b", 0), Ready)


def test_an_image_above_the_whole_budget_fails_with_the_numbers(harness):
    store = harness.store(units=3)
    state = harness.load_any(store, "a:4")
    assert isinstance(state.error, AdapterFileError)
    assert state.error.key == "bytes"
    assert str(4 * UNIT) in state.error.message
    assert str(3 * UNIT) in state.error.message
    assert store.host_bytes == 0


def test_a_failed_load_is_tried_again_after_a_while(harness):
    store = harness.store(retry_seconds=5.0)
    failed = harness.load_any(store, "!a")
    assert isinstance(failed, Failed)
    assert (failed.error.key, failed.at) == ("tensor", 100.0)
    harness.now += 4.9
    store.request("!a", 0)
    assert store.state("!a", 0) is failed
    harness.now += 0.2
    again = harness.load_any(store, "!a")
    assert again is not failed
    assert harness.reader.calls == ["!a", "!a"]
    assert store.stats.failures == 2


@pytest.mark.parametrize("error", [RuntimeError("bug"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_no_exception_of_a_load_ends_its_thread(error, harness):
    def read(path: str) -> AdapterSpec:
        if path == "bad":
            raise error
        return spec_of(path)

    store = harness.store(threads=1, reader=read)
    failed = harness.load_any(store, "bad")
    assert failed.error is error
    assert isinstance(harness.load(store, "good"), Ready)


def test_a_failure_keeps_nothing_of_what_was_read(harness):
    references = []

    def read(path: str) -> AdapterSpec:
        spec = spec_of(path)
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

    monkeypatch.setattr("loraplex.memory.adapter_store.build_image", fail)
    assert isinstance(harness.load_any(store, "a"), Failed)
    assert store.host_bytes == 0
    store.check_integrity()


def test_only_so_many_failures_are_remembered(harness, monkeypatch):
    monkeypatch.setattr("loraplex.memory.adapter_store._MAX_FAILURES", 3)
    store = harness.store(threads=1)
    for i in range(5):
        harness.load_any(store, f"!{i}")
    assert [isinstance(store.state(f"!{i}", 0), Failed) for i in range(5)] == [False, False, True, True, True]


def test_a_load_that_is_forgotten_meanwhile_is_discarded(harness):
    store = harness.store(threads=1)
    harness.reader.gate.clear()
    store.request("a", 0)
    store.request("b", 0)
    wait_until(lambda: harness.reader.active == ["a"])
    store.forget("a", 0)
    store.forget("b", 0)
    harness.reader.gate.set()
    harness.load(store, "c")
    assert store.state("a", 0) == store.state("b", 0) == Absent()
    assert store.host_bytes == UNIT
    assert "b" not in harness.reader.calls


def test_a_path_forgotten_and_requested_again_is_read_again_but_never_twice_at_once(harness):
    store = harness.store(threads=2)
    harness.reader.gate.clear()
    store.request("a", 0)
    wait_until(lambda: harness.reader.active == ["a"])
    store.forget("a", 0)
    store.request("a", 0)
    time.sleep(0.02)
    assert harness.reader.active == ["a"]
    harness.reader.gate.set()
    harness.load(store, "a")
    assert harness.reader.calls == ["a", "a"]
    assert harness.reader.overlaps == 0


def test_forgetting_while_waiting_for_room_ends_the_wait(harness):
    store = harness.store(units=1)
    harness.load(store, "a")
    store.pin("a", 0)
    store.request("b", 0)
    wait_until(lambda: store.stats.waiting_for_room == 1)
    store.forget("b", 0)
    wait_until(lambda: store.stats.waiting_for_room == 0)
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
    assert store.host_bytes == 0


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
    wait_until(lambda: store.stats.waiting_for_room == 2)
    store.close()
    assert threading.active_count() == before
    assert isinstance(store.state("a", 0), Ready)


class StoreMachine(RuleBasedStateMachine):
    """Random use of a small store, with loads held up and let go at random moments.

    What the loader threads have done by a given step varies, so no rule draws by it.
    """

    KEYS = tuple((path, 0) for path in ("a:1", "a:1/copy", "b:1", "c:2", "c:2/copy", "d:3", "e:5", "!bad"))
    keys = st.sampled_from(KEYS)

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness()
        self.store = self.harness.store(units=4, threads=2)
        self.pins: dict[tuple[str, int], int] = {}
        self.wanted: set[tuple[str, int]] = set()

    @rule(key=keys)
    def request(self, key):
        self.store.request(*key)
        self.wanted.add(key)

    @rule(key=keys)
    def forget(self, key):
        self.store.forget(*key)
        self.wanted.discard(key)
        if key not in self.pins:
            assert self.store.state(*key) == Absent()

    @rule(key=keys)
    def pin(self, key):
        try:
            self.store.pin(*key)
        except KeyError:
            assert key not in self.pins
        else:
            self.pins[key] = self.pins.get(key, 0) + 1

    @rule(key=keys)
    def unpin(self, key):
        if key not in self.pins:
            return
        self.store.unpin(*key)
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]
            if key not in self.wanted:
                assert self.store.state(*key) == Absent()

    @rule()
    def hold_up(self):
        self.harness.reader.gate.clear()

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def pass_time(self, seconds):
        self.harness.now += seconds

    @rule()
    def settle(self):
        self.harness.reader.gate.set()
        wait_until(self.is_settled)

    def is_settled(self) -> bool:
        stats = self.store.stats
        return stats.waiting_for_room == min(stats.loading, 2)

    @invariant()
    def the_store_is_sound(self):
        self.store.check_integrity()
        assert self.harness.reader.overlaps == 0
        assert not self.pins or self.store.stats.images

    @invariant()
    def every_state_fits_its_path(self):
        for key in self.KEYS:
            state = self.store.state(*key)
            if key in self.pins:
                assert isinstance(state, Ready)
            elif key not in self.wanted:
                assert state == Absent()
            if isinstance(state, Ready):
                assert state.image.identity == key[0][0]
            if isinstance(state, Failed):
                assert key[0] in ("!bad", "e:5")

    def teardown(self) -> None:
        self.harness.close()


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_use_keeps_the_store_sound = StoreMachine.TestCase
