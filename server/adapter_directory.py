"""What the scheduler asks the host store of adapters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from loraplex.server.errors import LoraplexError
from loraplex.server.messages import AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterLoading:
    """The adapter is on its way to the host store."""


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """The adapter's image is in the host store.

    Attributes:
        identity: of its content.
        num_pages: that it takes in the pool.
        invocation: tokens from whose last occurrence in the prompt on it acts; empty where it acts on every token.
        mix_problem: why it cannot be part of a mix, as the end of a sentence; None where it can.
        routes_by_token: whether its experts depend on the ids of tokens, which must then be known.
    """

    identity: str
    num_pages: int
    invocation: tuple[int, ...] = ()
    mix_problem: str | None = None
    routes_by_token: bool = False


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

        Counted. Each request holds each of its adapters once, from just before its first lookup until its last choice
        has given up its pages, preemptions included.
        """

    def release_hold(self, ref: AdapterRef) -> None:
        """Undo one ``hold``."""

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        """Whether something waits for room on the host while nothing but these adapters is held there."""
