"""What the scheduler asks the host store of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from loraplex.server.errors import LoraplexError
from loraplex.server.messages import AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterLoading:
    """The adapter is on its way to the host store."""


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """The adapter's image is in the host store and takes ``num_pages`` pages of the pool."""

    identity: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    """The adapter cannot be served."""

    error: LoraplexError


AdapterStatus = AdapterLoading | AdapterReady | AdapterFailed


class AdapterDirectory(Protocol):
    """The host store of adapters, as the scheduler needs it. No call may block."""

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        """How far the adapter is; an absent one starts to load."""

    def hold(self, ref: AdapterRef) -> None:
        """Keep the adapter's image on the host from when it is read until ``release_hold``.

        Counted. Each request holds its adapter once, from just before its first lookup until its last choice has given
        up its pages, preemptions included.
        """

    def release_hold(self, ref: AdapterRef) -> None:
        """Undo one ``hold``."""
