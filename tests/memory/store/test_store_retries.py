"""When a load that failed is tried again."""

from __future__ import annotations

import errno

import pytest

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError, may_pass
from loraplex.memory.adapter_store import Failed, Ready
from loraplex.memory.store_retries import BackOff


def test_a_failed_load_is_tried_again_after_pauses_that_double(harness):
    store = harness.store(first_retry_seconds=1.0, longest_retry_seconds=5.0)
    for tries, pause in enumerate([1.0, 2.0, 4.0, 5.0, 5.0], start=1):
        failed = harness.load_any(store, "!a")
        assert isinstance(failed, Failed)
        assert (failed.error.key, failed.at, failed.retry_at) == ("tensor", harness.now, harness.now + pause)
        harness.now += pause - 0.01
        store.request("!a", 0)
        assert store.state("!a", 0) is failed
        assert len(harness.reader.calls) == tries
        harness.now += 0.02
    assert store.stats.failures == 5


def test_a_success_resets_the_pause(harness):
    store = harness.store(units=1)
    harness.reader.faults["a"] = [AdapterFileError("broken")] * 3
    for pause in (1.0, 2.0, 4.0):
        assert isinstance(harness.load_any(store, "a"), Failed)
        harness.now += pause
    assert isinstance(harness.load_any(store, "a"), Ready)
    harness.load(store, "b")
    harness.reader.faults["a"] = [AdapterFileError("broken")]
    assert harness.load_any(store, "a").retry_at == harness.now + 1.0


def test_forgetting_resets_the_pause(harness):
    store = harness.store()
    harness.load_any(store, "!a")
    store.forget("!a", 0)
    harness.load_any(store, "!a")
    assert harness.reader.calls == ["!a", "!a"]


def test_one_registration_that_fails_holds_up_no_other(harness):
    store = harness.store()
    harness.reader.faults["a"] = [AdapterFileError("broken")]
    assert isinstance(harness.load_any(store, "a", 0), Failed)
    assert isinstance(harness.load_any(store, "a", 1), Ready)


def passing() -> list[BaseException]:
    return [OSError(errno.EIO, "input/output error"), TransientReadError("the server is slow")]


def test_a_fault_that_may_pass_is_tried_again_at_once(harness):
    store = harness.store()
    harness.reader.faults["a"] = passing()
    assert isinstance(harness.load_any(store, "a"), Ready)
    assert harness.pauses == [0.1, 0.4]
    assert (store.stats.loads, store.stats.failures) == (1, 0)


def test_the_third_try_is_the_last(harness):
    store = harness.store()
    last = OSError(errno.ESTALE, "stale")
    harness.reader.faults["a"] = [*passing(), last]
    assert harness.load_any(store, "a").error is last
    assert len(harness.reader.calls) == 3


@pytest.mark.parametrize("error", [AdapterFileError("broken"), FileNotFoundError(errno.ENOENT, "gone"), ValueError()])
def test_a_fault_that_stays_is_not_tried_again_at_once(error, harness):
    store = harness.store()
    harness.reader.faults["a"] = [error]
    assert harness.load_any(store, "a").error is error
    assert harness.reader.calls == ["a"]
    assert harness.pauses == []


def test_closing_ends_the_pauses(harness):
    store = harness.store(sleep=None)
    harness.reader.faults["a"] = passing()
    harness.reader.gate.clear()
    store.request("a", 0)
    harness.wait_until(lambda: harness.reader.active == ["a"])
    store._threads.closing.set()
    harness.reader.gate.set()
    store.close()
    assert len(harness.reader.calls) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_faults_of_networks_and_devices_may_pass(number):
    assert may_pass(OSError(number, ""))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, ""), OSError(errno.EACCES, ""), AdapterFileError(""), OSError()]
)
def test_other_faults_stay(error):
    assert not may_pass(error)


def test_pauses_stay_finite():
    assert BackOff(1.0, 60.0).pause(10_000) == 60.0
