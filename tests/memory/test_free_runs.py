from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory.free_runs import FreeRuns


def test_no_units_make_no_run() -> None:
    runs = FreeRuns(0)
    assert list(runs) == []
    assert runs.take_fitting(1) is None
    runs.check_integrity()


@pytest.mark.parametrize("count", [9, 16, 1000])
def test_more_than_there_is_fits_nowhere(count: int) -> None:
    runs = FreeRuns(8)
    assert runs.take_fitting(count) is None
    assert list(runs) == [(0, 8)]


class FreeRunsMachine(RuleBasedStateMachine):
    """Runs of free units against a plain set of them."""

    SIZE = 41

    def __init__(self) -> None:
        super().__init__()
        self.runs = FreeRuns(self.SIZE)
        self.free = set(range(self.SIZE))
        self.taken: list[range] = []

    def _take(self, units: range) -> None:
        assert set(units) <= self.free
        self.free -= set(units)
        self.taken.append(units)

    @rule(count=st.integers(1, SIZE + 5))
    def take_fitting(self, count: int) -> None:
        longest = max((length for _, length in self.runs), default=0)
        units = self.runs.take_fitting(count)
        if units is None:
            # A run of another class than the next higher one always fits; within one, not all are looked at.
            assert longest < 2 ** count.bit_length()
        else:
            assert len(units) == count
            self._take(units)

    @precondition(lambda self: self.free)
    @rule(limit=st.integers(1, SIZE))
    def take_largest(self, limit: int) -> None:
        longest = max(length for _, length in self.runs)
        units = self.runs.take_largest(limit)
        assert min(limit, (longest + 1) // 2) <= len(units) <= limit
        self._take(units)

    @precondition(lambda self: self.free)
    @rule(limit=st.integers(1, SIZE))
    def take_smallest(self, limit: int) -> None:
        shortest = min(length for _, length in self.runs)
        units = self.runs.take_smallest(limit)
        assert 1 <= len(units) <= min(limit, 2 * shortest)
        self._take(units)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        units = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        cut = data.draw(st.integers(1, len(units)))
        self.runs.add(units.start, cut)
        self.free |= set(units[:cut])
        if units[cut:]:
            self.taken.append(units[cut:])

    @invariant()
    def runs_are_maximal_and_cover_what_is_free(self) -> None:
        self.runs.check_integrity()
        units = [unit for first, length in self.runs for unit in range(first, first + length)]
        assert len(units) == len(self.free)
        assert set(units) == self.free


TestFreeRunsMachine = FreeRunsMachine.TestCase
TestFreeRunsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
