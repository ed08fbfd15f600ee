"""Loads that hang hold up no others: further loader threads start, and end again."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from loraplex.memory import store_threads
from loraplex.memory.adapter_errors import AdapterChangedError
from loraplex.memory.adapter_store import Failed, Loading, Ready


class HangingReader:
    """Reads what the fake reader reads; paths that begin with "hung" wait until ``release`` of them.

    Attributes:
        threads: those that are reading.
        most: so many there were at once.
    """

    def __init__(self, reader):
        self._reader, self._gates = reader, {}
        self._lock = threading.Lock()
        self.threads: set[int] = set()
        self.most = 0

    def __call__(self, path):
        me = threading.get_ident()
        with self._lock:
            self.threads.add(me)
            self.most = max(self.most, len(self.threads))
        try:
            if path.startswith("hung"):
                assert self._gate(path).wait(30)
            return self._reader(path)
        finally:
            with self._lock:
                self.threads.discard(me)

    def release(self, *paths):
        for path in paths:
            self._gate(path).set()

    def _gate(self, path):
        with self._lock:
            return self._gates.setdefault(path, threading.Event())


@pytest.fixture
def hanging(harness):
    return HangingReader(harness.reader)


def loader_threads(before):
    """Threads that were not there before."""
    return [thread for thread in threading.enumerate() if thread not in before]


def test_two_hung_reads_hold_up_a_third_for_no_longer_than_about_a_second(harness, hanging):
    store = harness.store(threads=2, reader=hanging)
    for path in ("hung-a", "hung-b"):
        store.request(path, 0)
    harness.wait_until(lambda: len(hanging.threads) == 2)
    started = time.monotonic()
    assert isinstance(harness.load(store, "c"), Ready)
    assert isinstance(harness.load(store, "d"), Ready)
    assert time.monotonic() - started < 3, "a second, on a machine that has other things to do"
    assert store.state("hung-a", 0) == store.state("hung-b", 0) == Loading()
    hanging.release("hung-a", "hung-b")
    harness.wait_until(lambda: store.stats.loading == 0)
    assert isinstance(store.state("hung-a", 0), Ready)


def test_loads_that_do_not_hang_get_no_further_threads(harness, hanging):
    store = harness.store(threads=2, reader=hanging, units=40)
    for number in range(30):
        store.request(f"a{number}", 0)
    harness.wait_until(lambda: store.stats.loading == 0)
    assert hanging.most <= 2


def test_threads_that_started_beside_hung_ones_end_when_those_are_free_again(harness, hanging):
    before = threading.enumerate()
    store = harness.store(threads=2, reader=hanging, units=20)
    usual = len(loader_threads(before))
    hung = [f"hung-{number}" for number in range(5)]
    for path in hung:
        store.request(path, 0)
    harness.wait_until(lambda: len(hanging.threads) == 5)
    assert len(loader_threads(before)) > usual
    hanging.release(*hung)
    harness.wait_until(lambda: len(loader_threads(before)) == usual)
    assert all(isinstance(store.state(path, 0), Ready) for path in hung)
    assert isinstance(harness.load(store, "after"), Ready), "those that are left go on working"
    store.close()
    assert not loader_threads(before)


def test_there_are_never_more_than_the_most_threads_however_many_loads_hang(harness, hanging, monkeypatch):
    monkeypatch.setattr(store_threads, "MOST_THREADS", 4)
    monkeypatch.setattr(store_threads, "_STUCK_SECONDS", 0.02)
    before = threading.enumerate()
    store = harness.store(threads=2, reader=hanging, units=20)
    usual = len(loader_threads(before))
    hung = [f"hung-{number}" for number in range(8)]
    for path in hung:
        store.request(path, 0)
    harness.wait_until(lambda: len(hanging.threads) == 4)
    assert not threading.Event().wait(0.2), "ten times as long as a load must hang to count as stuck"
    assert (hanging.most, len(loader_threads(before))) == (4, usual + 2)
    hanging.release(*hung[:1])
    harness.wait_until(lambda: isinstance(store.state(hung[0], 0), Ready))
    hanging.release(*hung)
    harness.wait_until(lambda: store.stats.loading == 0)
    assert hanging.most == 4


def test_a_store_closes_while_further_threads_are_at_work(harness, hanging):
    before = threading.enumerate()
    store = harness.store(threads=1, reader=hanging)
    for path in ("hung-a", "hung-b"):
        store.request(path, 0)
    harness.wait_until(lambda: len(hanging.threads) == 2)
    closing = threading.Thread(target=store.close)
    closing.start()
    hanging.release("hung-a", "hung-b")
    closing.join(20)
    assert not loader_threads(before)


def test_a_load_that_failed_is_tried_again_at_once_where_that_is_asked_for(harness):
    store = harness.store()
    harness.reader.faults["a"] = [ValueError("odd"), ValueError("odd again")]
    assert isinstance(harness.load_any(store, "a"), Failed)
    store.request("a", 0)
    assert isinstance(store.state("a", 0), Failed), "its pause is not over"
    store.retry("a", 0)
    harness.wait_until(lambda: not isinstance(store.state("a", 0), Loading))
    assert str(store.state("a", 0).error) == "odd again"
    store.retry("a", 0)
    harness.wait_until(lambda: isinstance(store.state("a", 0), Ready))
    assert harness.reader.calls == ["a"] * 3


def test_trying_again_changes_nothing_about_what_is_here_loading_or_unknown(harness):
    store = harness.store()
    ready = harness.load(store, "a")
    store.retry("a", 0)
    store.retry("unknown", 0)
    assert store.state("a", 0) == ready
    harness.reader.gate.clear()
    store.request("b", 0)
    store.retry("b", 0)
    harness.reader.gate.set()
    harness.wait_until(lambda: store.stats.loading == 0)
    assert harness.reader.calls == ["a", "b"]


def test_what_is_tried_again_must_still_be_what_was_registered(harness):
    store = harness.store()
    store.expect("a", 0, "a")
    harness.reader.swapped["a"] = "other"
    assert isinstance(harness.load_any(store, "a").error, AdapterChangedError)
    for _ in range(2):
        store.retry("a", 0)
        harness.wait_until(lambda: isinstance(store.state("a", 0), Failed))
        assert isinstance(store.state("a", 0).error, AdapterChangedError)
        assert store.expected("a", 0) == "a"
    del harness.reader.swapped["a"]
    store.retry("a", 0)
    harness.wait_until(lambda: isinstance(store.state("a", 0), Ready))


def test_what_a_registration_must_hold_is_what_was_read_first_or_what_was_said(harness):
    store = harness.store()
    assert store.expected("a", 0) is None
    harness.reader.gate.clear()
    store.request("a", 0)
    assert store.expected("a", 0) is None
    harness.reader.gate.set()
    harness.load(store, "a")
    assert store.expected("a", 0) == "a"
    assert store.expected("a", 1) is None
    store.expect("a", 0, "another")
    assert store.expected("a", 0) == "another"
    store.forget("a", 0)
    assert store.expected("a", 0) is None


def test_who_waits_for_room_is_told_by_registration(harness):
    store = harness.store(units=2)
    harness.load(store, "a:2")
    store.pin("a:2", 0)
    store.request("b", 0)
    harness.wait_until(lambda: store.waits_for_room([("b", 0)]))
    assert store.waits_for_room([("a:2", 0), ("b", 0)])
    assert not store.waits_for_room([("a:2", 0), ("b", 1)])
    assert not store.waits_for_room([])
    store.unpin("a:2", 0)
    harness.wait_until(lambda: isinstance(store.state("b", 0), Ready))
    assert not store.waits_for_room([("b", 0)])


def test_loads_compute_in_their_own_thread_alone(harness):
    """Else OpenMP would have more threads than there are cores, and wake them slowly."""
    seen: list[int] = []

    def reader(path: str) -> Any:
        seen.append(torch.get_num_threads())
        return harness.spec_of(path)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        store = harness.store(reader=reader)
        for path in "abc":
            harness.load(store, path)
        store.close()
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 3
        inherited = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        inherited.start()
        inherited.join()
        assert seen[-1] == 3
    finally:
        torch.set_num_threads(before)
