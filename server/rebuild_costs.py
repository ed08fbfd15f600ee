"""What it would take to have again what lies in the pool, as measured so far."""

from __future__ import annotations

from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.transfer import TransferStats

_FIRST_BYTES_PER_SECOND = 5e9
_FIRST_TOKENS_PER_SECOND = 5e3
_LEAST_TOKENS = 32
"""Steps of fewer tokens say little about prefill: reading the weights takes most of their time."""

_SHARE = 0.1
"""Of the estimate, that each new step makes up."""


class RebuildCosts:
    """Seconds to page an adapter in, from wherever it is, and to compute a page of K/V again.

    Args:
        store: the tier below the pool.
        page_tokens: tokens of a page.
        page_bytes: bytes of a page over all layers.

    Attributes:
        transfers: what has been paged in; set once there is a runner.
    """

    def __init__(self, store: AdapterStore, page_tokens: int, page_bytes: int) -> None:
        self._store = store
        self._page_tokens = page_tokens
        self._page_bytes = page_bytes
        self._seconds_per_token = 1 / _FIRST_TOKENS_PER_SECOND
        self.transfers: TransferStats | None = None

    def of_adapter(self, identity: str, num_pages: int) -> float:
        """Seconds to bring an adapter of so many pages into the pool."""
        stats = self.transfers
        rate = _FIRST_BYTES_PER_SECOND
        if stats is not None and stats.num_bytes and stats.seconds:
            rate = stats.num_bytes / stats.seconds
        seconds = num_pages * self._page_bytes / rate
        return seconds if self._store.holds(identity) else seconds + self._store.seconds_to_read(identity)

    def of_page(self) -> float:
        """Seconds to compute the K/V of a page."""
        return self._seconds_per_token * self._page_tokens

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if num_tokens >= _LEAST_TOKENS and seconds > 0:
            self._seconds_per_token += _SHARE * (seconds / num_tokens - self._seconds_per_token)
