"""Finds stop strings in text that arrives in pieces, in one pass (Aho & Corasick, 1975).

The stop string that is completed first wins; of several completed by the same character, the longest. So the result
does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopPatterns:
    """The automaton of some stop strings. Immutable once built, shared by all choices of a request.

    A state stands for the longest suffix of the text that begins a stop string, and ``depth`` is its length. ``match``
    is the length of the longest stop string that ends there, 0 for none.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.match = [0]
        for pattern in patterns:
            self._insert(pattern)
        self._link()

    def step(self, state: int, letter: str) -> int:
        """The state after one more letter."""
        while letter not in self._next[state]:
            if state == 0:
                return 0
            state = self._fail[state]
        return self._next[state][letter]

    def _insert(self, pattern: str) -> None:
        state = 0
        for depth, letter in enumerate(pattern, start=1):
            if letter not in self._next[state]:
                self._next[state][letter] = self._new_state(depth)
            state = self._next[state][letter]
        self.match[state] = len(pattern)

    def _new_state(self, depth: int) -> int:
        self._next.append({})
        self._fail.append(0)
        self.depth.append(depth)
        self.match.append(0)
        return len(self._next) - 1

    def _link(self) -> None:
        """Gives every state its longest proper suffix that is a state too, shallow states first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for letter, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], letter)
                self.match[child] = self.match[child] or self.match[self._fail[child]]
                queue.append(child)


class StopScanner:
    """One choice's text on its way out: holds back what may yet turn out to be a stop string.

    ``matched`` is the length of the stop string found, 0 while there is none.
    """

    __slots__ = ("_held", "_patterns", "_state", "matched")

    def __init__(self, patterns: StopPatterns) -> None:
        self._patterns = patterns
        self._state = 0
        self._held = ""
        self.matched = 0

    @property
    def held(self) -> str:
        """Text that came in and has not gone out."""
        return self._held

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Takes text and returns what is safe to send. While not ``armed``, complete stop strings are let through.

        On a match, the text up to and including the stop string is returned, ``matched`` is set, and whatever follows
        is dropped.
        """
        patterns, state = self._patterns, self._state
        for at, letter in enumerate(text):
            state = patterns.step(state, letter)
            if armed and patterns.match[state]:
                return self._found(text[: at + 1], patterns.match[state])
        self._state = state
        return self._release(self._held + text, patterns.depth[state])

    def finish(self) -> str:
        """The text is over: returns what was held back."""
        self._state = 0
        return self._release(self._held, 0)

    def _found(self, text: str, length: int) -> str:
        self.matched = length
        return self._release(self._held + text, 0)

    def _release(self, window: str, keep: int) -> str:
        cut = len(window) - keep
        self._held = window[cut:]
        return window[:cut]
