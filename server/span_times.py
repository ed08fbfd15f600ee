"""What the engine did for a request, and when: it crosses the socket with a request's first output and with its ends.

Times are seconds of the monotonic clock, which all processes of one machine share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

_SHOWN_DIGITS = 12


def short_identity(identity: str) -> str:
    """The beginning of an adapter's identity, which logs and traces show."""
    return identity[:_SHOWN_DIGITS]


class AdapterLoad(msgspec.Struct, frozen=True, array_like=True):
    """An adapter came from a tier, or from ``remote``, to another one. ``num_bytes`` are those of its image.

    ``ended`` is None where the copy was not over when it was told of.
    """

    source: Literal["remote", "disk", "host"]
    target: Literal["disk", "host", "pool"]
    started: float
    ended: float | None
    num_bytes: int = 0


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """An adapter of a request, and what had to be loaded of it since the request arrived."""

    name: str
    identity: str
    kind: str = ""
    loads: list[AdapterLoad] = []


class BeginTimes(msgspec.Struct, frozen=True, array_like=True):
    """A request arrived at the engine, its first choice was let in, and the first output was there."""

    arrived: float
    scheduled: float
    first_output: float
    adapters: list[AdapterUse] = []


class EndTimes(msgspec.Struct, frozen=True, array_like=True):
    """A choice ended; ``preempted`` says when it had to give up its pages meanwhile."""

    ended: float
    preempted: list[float] = []


class FailTimes(msgspec.Struct, frozen=True, array_like=True):
    """A request failed; ``adapter`` names the one that could not be loaded since ``load_started``, if that was it."""

    arrived: float
    ended: float
    adapter: str | None = None
    load_started: float | None = None
