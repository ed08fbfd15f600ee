"""Random use of a small store: whatever happens in whatever order, it stays sound and serves the right content."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loraplex.memory.adapter_errors import AdapterChangedError
from loraplex.memory.adapter_store import Absent, Failed, Ready
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.eviction_order import LruOrder, ValueOrder

KEYS = tuple((path, 0) for path in ("a:1", "a:1/copy", "b:1", "c:2", "c:2/copy", "d:3", "f:2", "e:9", "!bad"))
SWAPPED = ("a:1", "c:2", "f:2")
"""Paths whose files may come to hold something else."""

keys = st.sampled_from(KEYS)


class StoreMachine(RuleBasedStateMachine):
    """Loads are held up and let go, files swapped and swapped back, images read for longer than they are kept.

    What the loader threads have done by a given step varies, so no rule draws by it.
    """

    def __init__(self, make_harness: Callable[[], Any]) -> None:
        super().__init__()
        self.harness = make_harness()
        self.pins: dict[tuple[str, int], int] = {}
        self.wanted: set[tuple[str, int]] = set()
        self.expected: dict[tuple[str, int], str] = {}
        self.readers: list[Any] = []

    @initialize(by_value=st.booleans())
    def make(self, by_value):
        self.rates = ArrivalRates(clock=lambda: self.harness.now)
        self.store = self.harness.store(
            units=7, threads=2, rates=self.rates, order=ValueOrder() if by_value else LruOrder()
        )

    @rule(key=keys)
    def request(self, key):
        self.rates.note(key[0][0])
        self.store.request(*key)
        self.wanted.add(key)

    @rule(key=keys)
    def forget(self, key):
        self.store.forget(*key)
        self.wanted.discard(key)
        if key not in self.pins:
            self.expected.pop(key, None)
            assert self.store.state(*key) == Absent()
            assert self.store.content(*key) is None

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
                self.expected.pop(key, None)
                assert self.store.state(*key) == Absent()

    @rule(path=st.sampled_from(SWAPPED), back=st.booleans())
    def swap(self, path, back):
        if back:
            self.harness.reader.swapped.pop(path, None)
        else:
            self.harness.reader.swapped[path] = "x" + path[0]

    @rule(key=keys)
    def read_for_long(self, key):
        state = self.store.state(*key)
        if isinstance(state, Ready):
            self.readers.append((state.image, state.image.data.clone()))

    @rule()
    def stop_reading(self):
        self.readers.clear()

    @rule()
    def hold_up(self):
        self.harness.reader.gate.clear()

    @rule(seconds=st.sampled_from([1.0, 100.0]))
    def pass_time(self, seconds):
        self.harness.now += seconds

    @rule()
    def settle(self):
        self.harness.reader.gate.set()
        self.harness.wait_until(self.is_settled)

    def is_settled(self) -> bool:
        stats = self.store.stats
        return stats.waiting_for_room == min(stats.loading, 2)

    @rule()
    def feeds_name_what_is_known(self):
        assert self.store.take_changes() <= set(KEYS)
        assert {identity[-1] for identity in self.store.take_moves()} <= set("abcdf")

    @invariant()
    def the_store_is_sound(self):
        self.store.check_integrity()
        assert self.harness.reader.overlaps == 0
        stats = self.store.stats
        assert not self.pins or stats.images
        assert stats.images == sum(use.adapters for use in stats.by_kind.values())

    @invariant()
    def every_state_fits_its_path(self):
        for key in KEYS:
            state, content = self.store.state(*key), self.store.content(*key)
            if key in self.pins:
                assert isinstance(state, Ready)
            elif key not in self.wanted:
                assert state == Absent()
            if isinstance(state, Ready):
                assert state.image.identity in (key[0][0], "x" + key[0][0])
                assert content == state.content
                assert self.expected.setdefault(key, content.identity) == content.identity, "it serves something else"
            if isinstance(state, Failed):
                assert key[0] in ("!bad", "e:9") or isinstance(state.error, AdapterChangedError)

    @invariant()
    def what_is_being_read_stays_as_it_is(self):
        for image, data in self.readers:
            assert (image.data == data).all()

    def teardown(self) -> None:
        self.readers.clear()
        self.harness.close()


@pytest.mark.timeout(120)
def test_random_use_keeps_the_store_sound(make_harness):
    run_state_machine_as_test(
        partial(StoreMachine, make_harness),
        settings=settings(max_examples=60, stateful_step_count=50, deadline=None),
    )
