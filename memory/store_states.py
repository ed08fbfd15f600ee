"""What a host store says of its adapters, and of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_spec import AdapterSpec, RoutingScope

Key = tuple[str, int]
"""A registration: path and revision."""


@dataclass(frozen=True, slots=True)
class Content:
    """What an adapter is, known once it has been read and for as long as anybody has it registered.

    Attributes:
        num_bytes: of its image on the host.
        num_pages: of its image, in the pool.
        num_experts, scope: of its routing: 0 and None where it has none.
        routes_by_token: whether the choice of experts depends on the token alone.
        first_kv_layer: the first layer whose keys and values may differ from the base's; the number of layers where
            none may.
        identity, kind, rank, targets, invocation, warnings: as in ``AdapterSpec``.
    """

    identity: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    num_bytes: int
    num_pages: int
    invocation: tuple[int, ...] = ()
    num_experts: int = 0
    scope: RoutingScope | None = None
    routes_by_token: bool = False
    warnings: tuple[str, ...] = ()
    first_kv_layer: int = 0


def content_of(spec: AdapterSpec, num_layers: int, num_pages: int, num_bytes: int) -> Content:
    """What is known of an adapter once its file has been read and its image planned."""
    return Content(
        identity=spec.identity,
        kind=spec.kind,
        rank=spec.rank,
        targets=spec.targets,
        num_bytes=num_bytes,
        num_pages=num_pages,
        invocation=spec.invocation,
        num_experts=spec.num_experts,
        scope=spec.routing.scope if spec.routing else None,
        routes_by_token=spec.token_routes is not None,
        warnings=spec.warnings,
        first_kv_layer=spec.first_kv_layer(num_layers),
    )


@dataclass(frozen=True, slots=True)
class Absent:
    """Not here, and nobody is reading it."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Waiting for a loader thread, being read, or waiting for room."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Here. ``seconds`` is what reading, verifying and laying out took, without the wait for room; ``started`` and
    ``ended`` say when, on the store's clock.

    Who keeps the image, or this, keeps its memory from being given to others.
    """

    image: AdapterImage
    content: Content
    seconds: float
    started: float = 0.0
    ended: float = 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.content.warnings

    @property
    def rank(self) -> int:
        return self.content.rank

    @property
    def targets(self) -> tuple[str, ...]:
        return self.content.targets

    @property
    def num_experts(self) -> int:
        return self.content.num_experts

    @property
    def scope(self) -> RoutingScope | None:
        return self.content.scope

    @property
    def invocation(self) -> tuple[int, ...]:
        return self.content.invocation


@dataclass(frozen=True, slots=True)
class Failed:
    """Could not be read. ``error`` is an AdapterFileError unless the fault is ours.

    Attributes:
        at: when, on the store's clock.
        retry_at: from when on a request tries again.
    """

    error: BaseException
    at: float
    retry_at: float


LoadState = Absent | Loading | Ready | Failed


@dataclass(frozen=True, slots=True)
class KindUse:
    """What adapters of a kind take in the store."""

    adapters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot. Counters run since the store was made.

    Attributes:
        images: contents that are here, those being laid out included.
        host_bytes: of them, and of images that have left but that somebody still reads.
        byte_limit: of ``host_bytes``.
        loading: registrations that are Loading.
        waiting_for_room: of these, those whose image finds no room.
        hits: requests for what was here already.
        misses: requests that set off a load.
        loads, failures: how loads ended.
        evictions_by_reason: images that left: for "room", because nobody who had them registered was left
            ("forgotten"), or because other content was expected ("changed").
        by_kind: what is here.
    """

    images: int
    host_bytes: int
    byte_limit: int
    loading: int
    waiting_for_room: int
    hits: int
    misses: int
    loads: int
    failures: int
    evictions_by_reason: Mapping[str, int] = field(default_factory=dict)
    by_kind: Mapping[str, KindUse] = field(default_factory=dict)

    @property
    def evictions(self) -> int:
        """Images that made room for others."""
        return self.evictions_by_reason.get("room", 0)
