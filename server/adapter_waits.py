"""Who waits for which adapter to be read."""

from __future__ import annotations

from loraplex.server.adapter_directory import AdapterDirectory, AdapterLoading
from loraplex.server.errors import AdapterTooLargeError, LoraplexError, OverloadedError
from loraplex.server.messages import AdapterRef
from loraplex.server.request import Request, Sequence

_STUCK_SECONDS = 5.0
"""So long must mixes have been stuck before one is given up: room may be taken by an image that is being laid out, or
be there already for a loader that has not run yet."""


class AdapterWaits:
    """Sequences that stand aside, each for the adapters of its request that are still loading.

    Only requests for several adapters can hold some while they wait for others; so only they can wait for one another,
    or for room that they take up themselves.

    Args:
        directory: the host store of adapters.
    """

    def __init__(self, directory: AdapterDirectory) -> None:
        self._directory = directory
        self._waiting: dict[AdapterRef, dict[Sequence, None]] = {}
        self._mixes: dict[Sequence, None] = {}
        self._stuck_since: float | None = None

    @property
    def loading(self) -> tuple[AdapterRef, ...]:
        """Adapters that are waited for."""
        return tuple(self._waiting)

    def add(self, sequence: Sequence, refs: list[AdapterRef]) -> None:
        """Let a sequence wait until one of these adapters loads no more."""
        for ref in refs:
            self._waiting.setdefault(ref, {})[sequence] = None
        if len(sequence.request.weights) > 1:
            self._mixes[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """Let a sequence wait no longer, whether or not it does."""
        self._mixes.pop(sequence, None)
        for ref in sequence.request.weights:
            if ref in self._waiting:
                self._waiting[ref].pop(sequence, None)
                if not self._waiting[ref]:
                    del self._waiting[ref]

    def poll(self) -> list[Sequence]:
        """Take out those for whom an adapter has been read or could not be; who waits for more is to be put back."""
        done: list[Sequence] = []
        for ref in list(self._waiting):
            if ref not in self._waiting:  # its last sequence has just gone, because of another adapter
                continue
            if isinstance(self._directory.lookup(ref), AdapterLoading):
                continue
            for sequence in list(self._waiting[ref]):
                self.discard(sequence)
                done.append(sequence)
        return done

    def give_up(self, now: float) -> tuple[Request, LoraplexError] | None:
        """The mix that came last, and its error, where mixes alone keep from the host what they wait for."""
        refs = {ref for sequence in self._mixes for ref in sequence.request.weights}
        if not refs or not self._directory.is_full_of(refs):
            self._stuck_since = None
            return None
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < _STUCK_SECONDS:
            return None
        self._stuck_since = None
        requests = {sequence.request: None for sequence in self._mixes}
        latest = max(requests, key=lambda request: request.sequences[0].seq_id)
        if len(requests) == 1:
            names = ", ".join(f"'{ref.name}'" for ref in latest.weights)
            return latest, AdapterTooLargeError(
                f"Adapters {names} do not fit into the host store together.", param="adapter_id"
            )
        return latest, OverloadedError("The host store has no room for the adapters of one more mix at present.")

    def sequences(self) -> list[Sequence]:
        """All that wait."""
        return list(dict.fromkeys(sequence for waiting in self._waiting.values() for sequence in waiting))
