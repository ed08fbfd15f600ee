"""Where each registered adapter has come to, as the engine last told: a mirror, so that nobody need ask the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from loraplex.memory.merge_recipe import PREFIX
from loraplex.server.messages import AdapterRef, AdapterState

Phase = Literal["registered", "loading", "ready", "failed"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Never read; being read; read, wherever it is now; could not be read the last time."""

StatesCallback = Callable[[Sequence[AdapterState]], None]


class AdapterView:
    """The last state of each registration, by path and revision. One of which nothing was told is on disk, unread.

    Attributes:
        on_states: called with every news of the engine.
        version: changes with any state.
    """

    def __init__(self) -> None:
        self.on_states: list[StatesCallback] = []
        self.version = 0
        self._states: dict[tuple[str, int], AdapterState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def update(self, states: Sequence[AdapterState]) -> None:
        """News came. Merges of adapters are made for requests and have no registration: they are passed over."""
        self.version += 1
        for state in states:
            if not state.path.startswith(PREFIX):
                self._states[state.path, state.revision] = state
        for callback in self.on_states:
            callback(states)

    def state(self, ref: AdapterRef) -> AdapterState:
        """The state of a registration."""
        return self.state_at((ref.path, ref.revision))

    def state_at(self, key: tuple[str, int]) -> AdapterState:
        """The state of the registration with this path and revision."""
        found = self._states.get(key)
        return AdapterState(path=key[0], revision=key[1]) if found is None else found

    def forget(self, ref: AdapterRef) -> None:
        """A registration is no more."""
        self.version += 1
        self._states.pop((ref.path, ref.revision), None)

    def clear(self) -> None:
        """Another engine has started, which has read nothing yet."""
        self.version += 1
        self._states.clear()


def phase_of(state: AdapterState, *, known: bool) -> Phase:
    """A state in one word; ``known`` says that the adapter was read at some time, if by an engine before."""
    if state.loading:
        return "loading"
    if state.error is not None:
        return "failed"
    return "ready" if known or state.info is not None else "registered"
