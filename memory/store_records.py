"""The registrations that a host store knows: their states, and which of them have changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from loraplex.memory.store_states import Absent, Content, Failed, Key, LoadState

MAX_DORMANT = 100_000
"""So many registrations that are neither here nor loading are remembered; the oldest are forgotten first."""


@dataclass(slots=True, eq=False)
class Record:
    """What is known of a registration.

    Attributes:
        content: of its last successful read.
        expected: the identity that a read must yield; None before the first.
        failures: loads that have failed since one succeeded.
        forgotten: is to go at the last unpin.
    """

    key: Key
    state: LoadState = field(default_factory=Absent)
    content: Content | None = None
    expected: str | None = None
    failures: int = 0
    pins: int = 0
    forgotten: bool = False


class Records:
    """Registrations by key. Not thread-safe.

    Args:
        max_dormant: bound on those that are Absent or Failed.
    """

    def __init__(self, max_dormant: int = MAX_DORMANT) -> None:
        self._max_dormant = max_dormant
        self._records: dict[Key, Record] = {}
        self._dormant: OrderedDict[Key, None] = OrderedDict()
        self._changes: set[Key] = set()

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def find(self, key: Key) -> Record | None:
        """The record of a registration, if there is one."""
        return self._records.get(key)

    def obtain(self, key: Key) -> Record:
        """The record of a registration; a new one is Absent."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(key)
            self._rest(record)
        return record

    def is_current(self, record: Record) -> bool:
        """Whether it has not been removed since."""
        return self._records.get(record.key) is record

    def set_state(self, record: Record, state: LoadState) -> None:
        """Note a new state."""
        record.state = state
        self._changes.add(record.key)
        self._dormant.pop(record.key, None)
        if isinstance(state, Absent | Failed):
            self._rest(record)

    def remove(self, record: Record) -> None:
        """Know nothing of a registration any more."""
        del self._records[record.key]
        self._dormant.pop(record.key, None)
        self._changes.discard(record.key)

    def take_changes(self) -> set[Key]:
        """Those whose state has changed since the last call and that are still known."""
        changes, self._changes = self._changes, set()
        return changes

    def _rest(self, record: Record) -> None:
        self._dormant[record.key] = None
        if len(self._dormant) > self._max_dormant:
            self.remove(self._records[next(iter(self._dormant))])

    def check_integrity(self) -> None:
        """AssertionError where records and their lists disagree."""
        assert all(record.key == key for key, record in self._records.items())
        dormant = {record.key for record in self if isinstance(record.state, Absent | Failed)}
        assert self._dormant.keys() == dormant
        assert self._changes <= self._records.keys()
        assert all(record.pins == 0 for record in self if record.key in dormant)
