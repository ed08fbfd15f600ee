"""Where the low-rank rows of resident adapters lie in the arena, as index arrays that kernels gather by.

The arena is seen as a table of chunks of 128 elements: ``arena[layer]`` as ``[num_pages * page_chunks, 128]`` for the
sites of a layer, the whole arena as ``[num_layers * num_pages * page_chunks, 128]`` for the sites that belong to none
and whose rows are dealt out over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

CHUNK = 128

Int64Array = npt.NDArray[np.int64]


class SiteLayoutLike(Protocol):
    """Where one low-rank pair lies; positions in chunks from the start of the adapter's image in a layer."""

    @property
    def rank(self) -> int: ...
    @property
    def a_start(self) -> int: ...
    @property
    def a_stride(self) -> int: ...
    @property
    def b_start(self) -> int: ...
    @property
    def b_stride(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def gain_start(self) -> int | None: ...


class RouterLayoutLike(Protocol):
    """Where a router's float32 rows lie; positions in chunks likewise."""

    @property
    def num_experts(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stride(self) -> int: ...


class MixtureLayoutLike(Protocol):
    """The part of a layer that belongs to experts: each expert's sites, and the routers by what they route."""

    @property
    def experts(self) -> Sequence[Mapping[str, SiteLayoutLike]]: ...
    @property
    def routers(self) -> Mapping[str, RouterLayoutLike]: ...


class ImageLayoutLike(Protocol):
    """Layout of a whole adapter: its distinct layer layouts, which layer has which, and its model sites."""

    @property
    def layouts(self) -> Sequence[Mapping[str, SiteLayoutLike]]: ...
    @property
    def mixtures(self) -> Sequence[MixtureLayoutLike]: ...
    @property
    def layout_of_layer(self) -> Sequence[int]: ...
    @property
    def model(self) -> Mapping[str, SiteLayoutLike]: ...


class RoutingLike(Protocol):
    """How an adapter's routers choose experts (the arithmetic is that of ``ops.route``)."""

    @property
    def scope(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def activation(self) -> str | None: ...


class TokenRoutesLike(Protocol):
    """The experts of every token, [vocabulary, limit], and their weights, where they depend on the token alone."""

    @property
    def experts(self) -> torch.Tensor: ...
    @property
    def weights(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Linears that read the same input and whose outputs are computed as one row, one after another.

    Attributes:
        sites: their names in the order of the outputs.
        in_features: width of the input.
        out_features: width of each output.
    """

    sites: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def in_chunks(self) -> int:
        return -(-self.in_features // CHUNK)

    @property
    def out_chunks(self) -> tuple[int, ...]:
        return tuple(-(-width // CHUNK) for width in self.out_features)

    @property
    def outputs_are_chunked(self) -> bool:
        """Whether every output is a whole number of chunks, so that a chunked result needs no trimming."""
        return all(width % CHUNK == 0 for width in self.out_features)


@dataclass(frozen=True, slots=True)
class SitePart:
    """One site of a group as one adapter has it.

    Attributes:
        index: which site of the group.
        rows: this site's rows of the group's low-rank intermediate, [start, stop).
        b_ids: [rank, out_chunks] chunk ids of B transposed.
        scale: of the product.
    """

    index: int
    rows: tuple[int, int]
    b_ids: Int64Array
    scale: float


@dataclass(frozen=True, slots=True)
class GroupRows:
    """What one adapter has at the sites of one group.

    Attributes:
        a_ids: [rows, in_chunks] chunk ids of A, the sites' rows one after another.
        scales: [rows] float32, the scale of each row's site.
        parts: the sites present.
        expand_ids: chunk ids of B in the order in which ``expand`` sums them: by site, by output chunk, by row.
        expand_rows: the row of the intermediate that weighs each of ``expand_ids``.
        bag_sizes: [sum of out_chunks] how many of ``expand_ids`` each output chunk sums; 0 where a site is absent.
        gain_ids: chunk ids of the gains less one, of the sites that have any.
        gain_chunks: the output chunk that each of ``gain_ids`` belongs to.
        contiguous: whether A's chunk ids, and each B's, ascend by one, so that the matrices are views of the arena.
    """

    a_ids: Int64Array
    scales: npt.NDArray[np.float32]
    parts: tuple[SitePart, ...]
    expand_ids: Int64Array
    expand_rows: Int64Array
    bag_sizes: Int64Array
    gain_ids: Int64Array
    gain_chunks: Int64Array
    contiguous: bool

    @property
    def num_rows(self) -> int:
        return len(self.a_ids)


def _ascends_by_one(ids: Int64Array) -> bool:
    flat = ids.ravel()
    return bool(flat[-1] - flat[0] == flat.size - 1 and (np.diff(flat) == 1).all())


@dataclass(frozen=True, slots=True)
class RouterRows:
    """A router in the arena: ``ids [num_experts, stride]`` of the chunks of its float32 rows."""

    ids: Int64Array
    in_features: int
    contiguous: bool

    @property
    def num_experts(self) -> int:
        return len(self.ids)


@dataclass(eq=False, slots=True)
class ResidentAdapter:
    """An adapter in the pool, as the kernels see it. Rows are worked out on first use and kept while it is resident.

    Args:
        layout: where its rows lie in its image.
        pages: its page list.
        page_chunks: chunks of a page in one layer.
        num_layers, num_pages: shape of the arena.
        routing: how its experts are chosen; None where it has none.
        token_routes: where the choice depends on the token alone.
    """

    layout: ImageLayoutLike
    pages: Sequence[int]
    page_chunks: int
    num_layers: int
    num_pages: int
    routing: RoutingLike | None = None
    token_routes: TokenRoutesLike | None = None
    _rows: dict[tuple[int, int | None, tuple[str, ...]], GroupRows | None] = field(default_factory=dict)
    _routers: dict[tuple[int, str], RouterRows | None] = field(default_factory=dict)

    def layer_rows(self, layer: int, group: SiteGroup, expert: int | None = None) -> GroupRows | None:
        """What the adapter, or one expert of it, has at a group of a layer; None where it has nothing.

        The same object for like layers.
        """
        index = self.layout.layout_of_layer[layer]
        key = (index, expert, group.sites)
        if key not in self._rows:
            self._rows[key] = self._find_rows(group, self._layer_layout(index, expert), striped=False)
        return self._rows[key]

    def model_rows(self, group: SiteGroup) -> GroupRows | None:
        """What the adapter has at a group of model sites, with ids into the whole arena."""
        key = (-1, None, group.sites)
        if key not in self._rows:
            self._rows[key] = self._find_rows(group, self.layout.model, striped=True)
        return self._rows[key]

    def router(self, layer: int, site: str) -> RouterRows | None:
        """The router of a site of a layer; None where there is none. The same object for like layers."""
        key = (self.layout.layout_of_layer[layer], site)
        if key not in self._routers:
            at = self.layout.mixtures[key[0]].routers.get(site)
            self._routers[key] = None if at is None else self._router_rows(at)
        return self._routers[key]

    def _router_rows(self, at: RouterLayoutLike) -> RouterRows:
        ids = self._chunk_ids(at.start, at.num_experts, at.stride, striped=False)
        return RouterRows(ids, at.in_features, _ascends_by_one(ids))

    def _layer_layout(self, index: int, expert: int | None) -> Mapping[str, SiteLayoutLike]:
        if expert is None:
            return self.layout.layouts[index]
        experts = self.layout.mixtures[index].experts
        return experts[expert] if expert < len(experts) else {}

    def _find_rows(self, group: SiteGroup, layout: Mapping[str, SiteLayoutLike], *, striped: bool) -> GroupRows | None:
        parts: list[SitePart] = []
        a_ids: list[Int64Array] = []
        gains: list[tuple[Int64Array, int]] = []
        start = 0
        for index, site in enumerate(group.sites):
            if site not in layout:
                continue
            at = layout[site]
            a_ids.append(self._chunk_ids(at.a_start, at.rank, at.a_stride, striped=striped))
            b_ids = self._chunk_ids(at.b_start, at.rank, at.b_stride, striped=striped)
            parts.append(SitePart(index, (start, start + at.rank), b_ids, at.scale))
            start += at.rank
            if at.gain_start is not None:
                gain_ids = self._chunk_ids(at.gain_start, 1, at.b_stride, striped=striped)[0]
                gains.append((gain_ids, sum(group.out_chunks[:index])))
        if not parts:
            return None
        return _assemble(group, parts, np.concatenate(a_ids), gains)

    def _chunk_ids(self, start: int, rows: int, stride: int, *, striped: bool) -> Int64Array:
        """[rows, stride] ids of the chunks of consecutive rows."""
        pages = np.asarray(self.pages, dtype=np.int64)
        row = np.arange(rows, dtype=np.int64)
        layer, row = (row % self.num_layers, row // self.num_layers) if striped else (np.zeros_like(row), row)
        chunk = start + row[:, None] * stride + np.arange(stride, dtype=np.int64)[None, :]
        page = layer[:, None] * self.num_pages + pages[chunk // self.page_chunks]
        ids: Int64Array = page * self.page_chunks + chunk % self.page_chunks
        return ids


def _assemble(
    group: SiteGroup, parts: list[SitePart], a_ids: Int64Array, gains: list[tuple[Int64Array, int]]
) -> GroupRows:
    present = {part.index: part for part in parts}
    bag_sizes = [
        np.full(chunks, present[i].rows[1] - present[i].rows[0] if i in present else 0, dtype=np.int64)
        for i, chunks in enumerate(group.out_chunks)
    ]
    none = np.empty(0, dtype=np.int64)
    return GroupRows(
        a_ids=a_ids,
        scales=np.concatenate([np.full(p.rows[1] - p.rows[0], p.scale, dtype=np.float32) for p in parts]),
        parts=tuple(parts),
        expand_ids=np.concatenate([p.b_ids.T.ravel() for p in parts]),
        expand_rows=np.concatenate([np.tile(np.arange(*p.rows, dtype=np.int64), p.b_ids.shape[1]) for p in parts]),
        bag_sizes=np.concatenate(bag_sizes),
        gain_ids=np.concatenate([none, *(ids for ids, _ in gains)]),
        gain_chunks=np.concatenate([none, *(at + np.arange(len(ids)) for ids, at in gains)]),
        contiguous=_ascends_by_one(a_ids) and all(_ascends_by_one(p.b_ids) for p in parts),
    )
