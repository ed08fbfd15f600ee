"""What the scheduler asks the tiers below the pool."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from loraplex.server.errors import LoraplexError
from loraplex.server.messages import AdapterRef
from loraplex.server.span_times import AdapterLoad


@dataclass(frozen=True, slots=True)
class AdapterLoading:
    """The adapter is on its way to the host store."""


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """The adapter is in the pool, or its image is in the host store.

    Attributes:
        identity: of its content.
        num_pages: that it takes in the pool.
        invocation: tokens from whose last occurrence in the prompt on it acts; empty where it acts on every token.
        mix_problem: why it cannot be part of a mix, as the end of a sentence; None where it can.
        routes_by_token: whether its experts depend on the ids of tokens, which must then be known.
        changes_kv: whether K/V under it may differ from the base model's.
        kind: as in ``AdapterInfo``.
        num_bytes: of its image.
        loads: what brought it to the host last, in order, as far as that is known.
    """

    identity: str
    num_pages: int
    invocation: tuple[int, ...] = ()
    mix_problem: str | None = None
    routes_by_token: bool = False
    changes_kv: bool = True
    kind: str = ""
    num_bytes: int = 0
    loads: tuple[AdapterLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    """The adapter cannot be served."""

    error: LoraplexError


AdapterStatus = AdapterLoading | AdapterReady | AdapterFailed


class AdapterDirectory(Protocol):
    """The host store of adapters, as the scheduler needs it. No call may block."""

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        """How far the adapter is; one that is neither in the pool nor on the host starts to load."""

    def is_at_hand(self, ref: AdapterRef) -> bool:
        """Whether a lookup would find the adapter without loading it."""

    def hold(self, ref: AdapterRef) -> None:
        """Keep the adapter's image on the host until ``release_hold``, once it is read or found by a lookup; counted.

        Each sequence that waits holds each of its adapters from just before its first lookup until it is let in or
        ends. What is copied into the pool is held until it has arrived.
        """

    def release_hold(self, ref: AdapterRef) -> None:
        """Undo one ``hold``."""

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        """Whether something waits for room on the host while nothing but these adapters is held there."""
