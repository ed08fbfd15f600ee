"""Adapter images: the bytes of an adapter laid out page by page, as they will lie in the pool.

A page id names the same page in every layer, so an image is ``[num_layers, num_pages, page_elems]`` and an adapter has
one page list. Within a layer, the rank rows of every adapted site follow one another, by groups of sites that read the
same input: first each site's A as ``[rank, in]`` (so that a group's A is one matrix), then each site's B transposed as
``[rank, out]``. DoRA's gains are one more row behind them; a mixture's experts follow one after another, each laid out
likewise, and last its routers' rows. Every row starts on a chunk boundary (128 elements), so a chunk never straddles
pages. Rows of sites that belong to no layer are dealt out over the layers in turn, behind the layers' own rows.

A gain g is folded in: ``g * (W x + s B A x) = W x + (g - 1) * (W x) + s (g * B) A x``, so what lies here is ``g - 1``
and ``g * B``. That makes DoRA a low-rank update with a term more, which adds up with others; and near g = 1, where most
gains are, half precision keeps it best. Routers stay float32 whatever the model's dtype is: a route is a matter of
small differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from loraplex.memory.adapter_spec import (
    LAYER_GROUPS,
    MODEL_GROUPS,
    AdapterSpec,
    LowRankPair,
    Router,
    Routing,
    TokenRoutes,
)
from loraplex.memory.serial_torch import SERIAL_ELEMENTS

_Integers = Any  # numpy's array, as torch gives it
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

CHUNK = 128
"""Elements of the smallest unit that kernels address; rows are aligned to it."""


def chunks_of(elements: int) -> int:
    """Chunks that hold this many elements."""
    return -(-elements // CHUNK)


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """Where one low-rank pair lies in an image; all positions are in chunks from the image's start in a layer.

    Row ``i`` of A starts at ``a_start + i * a_stride``; row ``i`` of B transposed at ``b_start + i * b_stride``. For a
    model site, row ``i`` lies in layer ``i % num_layers`` at ``start + (i // num_layers) * stride``. The row of gains
    less one, if there is one, starts at ``gain_start``, for a model site in layer 0.
    """

    rank: int
    in_features: int
    out_features: int
    a_start: int
    b_start: int
    scale: float
    gain_start: int | None = None

    @property
    def a_stride(self) -> int:
        return chunks_of(self.in_features)

    @property
    def b_stride(self) -> int:
        return chunks_of(self.out_features)


LayerLayout = Mapping[str, SiteLayout]


@dataclass(frozen=True, slots=True)
class RouterLayout:
    """Where a router ``[num_experts, in_features]`` float32 lies: row ``e`` starts at chunk ``start + e * stride``."""

    num_experts: int
    in_features: int
    start: int
    stride: int


@dataclass(frozen=True, slots=True)
class MixtureLayout:
    """The part of a layer that belongs to experts.

    Attributes:
        experts: for each expert, the layout of its sites.
        routers: by the site that they route (see ``Router``).
    """

    experts: tuple[LayerLayout, ...] = ()
    routers: Mapping[str, RouterLayout] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where everything of an adapter lies.

    Attributes:
        layouts: the distinct layer layouts. Most adapters have one; a layer without any adapted site has an empty one.
        mixtures: what experts have in each of these layouts.
        layout_of_layer: for each layer, its index into ``layouts`` and ``mixtures``.
        model: layout of the model sites.
        num_chunks: chunks used in each layer.
    """

    layouts: tuple[LayerLayout, ...]
    mixtures: tuple[MixtureLayout, ...]
    layout_of_layer: tuple[int, ...]
    model: LayerLayout
    num_chunks: int

    def of_layer(self, layer: int) -> LayerLayout:
        return self.layouts[self.layout_of_layer[layer]]

    def mixture_of_layer(self, layer: int) -> MixtureLayout:
        return self.mixtures[self.layout_of_layer[layer]]

    def num_pages(self, page_elems: int) -> int:
        """Pages that the image takes where a page has ``page_elems`` elements per layer."""
        return -(-self.num_chunks * CHUNK // page_elems)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter ready to be paged in.

    Attributes:
        identity, kind: of the adapter (see ``AdapterSpec``).
        layout: where its rows lie.
        parts: all layers in order, each part some of them: [layers, num_pages, page_elems] in the model's dtype,
            contiguous, on the host; unused elements are zero.
        routing, token_routes, invocation: as in ``AdapterSpec``.
        room: what keeps the parts' memory from being given to others while the image lives, where somebody must.
    """

    identity: str
    kind: str
    layout: ImageLayout
    parts: tuple[torch.Tensor, ...]
    routing: Routing | None = None
    token_routes: TokenRoutes | None = None
    invocation: tuple[int, ...] = ()
    room: object = field(default=None, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def num_pages(self) -> int:
        return self.parts[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Of the rows, and of the routes by token where there are any."""
        return sum(part.nbytes for part in self.parts) + (self.token_routes.num_bytes if self.token_routes else 0)

    @property
    def data(self) -> torch.Tensor:
        """[num_layers, num_pages, page_elems]: the only part, or a copy of several."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def layer(self, index: int) -> torch.Tensor:
        """[num_pages, page_elems] of a layer."""
        return layer_of(self.parts, index)


def layer_of(parts: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    """A layer's tensor, where several parts hold consecutive layers. IndexError where they have no such layer."""
    for part in parts:
        if index < part.shape[0]:
            return part[index]
        index -= part.shape[0]
    raise IndexError(f"layer {index} beyond the last")


@dataclass(slots=True)
class _Layer:
    """What an adapter has in one layer, to be laid out."""

    pairs: dict[str, LowRankPair] = field(default_factory=dict)
    experts: dict[int, dict[str, LowRankPair]] = field(default_factory=dict)
    routers: dict[str, Router] = field(default_factory=dict)

    def add(self, pair: LowRankPair) -> None:
        (self.pairs if pair.expert is None else self.experts.setdefault(pair.expert, {}))[pair.site] = pair

    def lay_out(self, itemsize: int) -> tuple[LayerLayout, MixtureLayout, int]:
        """The layouts, and where they end in chunks."""
        layout, end = _lay_out(self.pairs, LAYER_GROUPS, start=0, rows_share=1)
        experts: list[LayerLayout] = []
        for expert in range(max(self.experts, default=-1) + 1):
            sites, end = _lay_out(self.experts.get(expert, {}), LAYER_GROUPS, start=end, rows_share=1)
            experts.append(sites)
        routers: dict[str, RouterLayout] = {}
        for site, router in self.routers.items():
            num_experts, in_features = router.weight.shape
            stride = chunks_of(in_features * torch.float32.itemsize // itemsize)
            routers[site] = RouterLayout(num_experts, in_features, end, stride)
            end += num_experts * stride
        return layout, MixtureLayout(tuple(experts), routers), end


def plan_layout(spec: AdapterSpec, num_layers: int, dtype: torch.dtype) -> ImageLayout:
    """Decide where each row of an adapter lies in an image of ``dtype``."""
    layers = [_Layer() for _ in range(num_layers)]
    model_pairs: dict[str, LowRankPair] = {}
    for pair in spec.pairs:
        if pair.layer is None:
            model_pairs[pair.site] = pair
        else:
            layers[pair.layer].add(pair)
    for router in spec.routers:
        layers[router.layer].routers[router.site] = router

    distinct: list[tuple[LayerLayout, MixtureLayout]] = []
    layout_of_layer: list[int] = []
    used = 0
    for layer in layers:
        layout, mixture, end = layer.lay_out(dtype.itemsize)
        layouts = (layout, mixture)
        used = max(used, end)
        if layouts not in distinct:
            distinct.append(layouts)
        layout_of_layer.append(distinct.index(layouts))
    model, used = _lay_out(model_pairs, MODEL_GROUPS, start=used, rows_share=num_layers)
    plain, mixtures = zip(*distinct)
    return ImageLayout(plain, mixtures, tuple(layout_of_layer), model, used)


def _lay_out(
    pairs: Mapping[str, LowRankPair], groups: tuple[tuple[str, ...], ...], *, start: int, rows_share: int
) -> tuple[LayerLayout, int]:
    """Place the groups one after another; each layer holds one of ``rows_share`` rows. Returns the end in chunks."""
    layout: dict[str, SiteLayout] = {}
    for group in groups:
        present = [pairs[site] for site in group if site in pairs]
        rows = [-(-pair.rank // rows_share) for pair in present]
        a_starts = list(accumulate((n * chunks_of(p.a.shape[1]) for n, p in zip(rows, present)), initial=start))
        b_starts = list(accumulate((n * chunks_of(p.b.shape[0]) for n, p in zip(rows, present)), initial=a_starts[-1]))
        start = b_starts[-1]
        for pair, a_start, b_start in zip(present, a_starts, b_starts):
            (rank, in_features), out_features = pair.a.shape, pair.b.shape[0]
            gain_start = None if pair.gain is None else start
            layout[pair.site] = SiteLayout(rank, in_features, out_features, a_start, b_start, pair.scale, gain_start)
            start += 0 if pair.gain is None else chunks_of(out_features)
    return layout, start


def build_image(
    spec: AdapterSpec,
    num_layers: int,
    page_elems: int,
    dtype: torch.dtype,
    *,
    layout: ImageLayout | None = None,
    parts: tuple[torch.Tensor, ...] | None = None,
    room: object = None,
) -> AdapterImage:
    """Lay an adapter out in page order.

    Args:
        layout: of ``plan_layout``, where it is known already.
        parts: where to, as in ``AdapterImage``, whatever they hold; by default new memory.
        room: kept with the image.
    """
    layout = layout or plan_layout(spec, num_layers, dtype)
    if parts is None:
        parts = (torch.empty((num_layers, layout.num_pages(page_elems), page_elems), dtype=dtype),)
    layers = [layer for part in parts for layer in as_integers(part).reshape(part.shape[0], -1)]
    covered: list[list[tuple[int, int]]] = [[] for _ in layers]
    for rows in rows_of(spec, layout, num_layers, dtype):
        start, stop = rows.start * CHUNK, (rows.start + rows.count * rows.stride) * CHUNK
        _store_rows(layers[rows.layer][start:stop].reshape(rows.count, -1), rows, dtype)
        covered[rows.layer].append((start, stop))
    for layer, spans in zip(layers, covered):
        _clear_the_rest(layer, spans)
    return AdapterImage(spec.identity, spec.kind, layout, parts, spec.routing, spec.token_routes, spec.invocation, room)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one layer, from chunk ``start`` on, each padded to ``stride`` chunks.

    Attributes:
        values: [count, width], or [width, count] where ``transposed``.
        gain: [width] float32, a factor on each column of transposed rows.
    """

    layer: int
    values: torch.Tensor
    start: int
    stride: int
    transposed: bool = False
    gain: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.values.shape[1 if self.transposed else 0]

    @property
    def width(self) -> int:
        return self.values.shape[0 if self.transposed else 1]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Some of ``values``, times the gain."""
        values = self.values[start:stop]
        return values if self.gain is None else values.float() * self.gain[start:stop, None]


def rows_of(spec: AdapterSpec, layout: ImageLayout, num_layers: int, dtype: torch.dtype) -> Iterator[Rows]:
    """Everything that an image consists of."""
    for pair in spec.pairs:
        site = _site_of(pair, layout)
        if pair.layer is None:
            for layer in range(min(num_layers, pair.rank)):
                yield Rows(layer, pair.a[layer::num_layers], site.a_start, site.a_stride)
                yield Rows(layer, pair.b[:, layer::num_layers], site.b_start, site.b_stride, True, pair.gain)
        else:
            yield Rows(pair.layer, pair.a, site.a_start, site.a_stride)
            yield Rows(pair.layer, pair.b, site.b_start, site.b_stride, True, pair.gain)
        if pair.gain is not None and site.gain_start is not None:
            yield Rows(pair.layer or 0, (pair.gain - 1)[None], site.gain_start, site.b_stride)
    for router in spec.routers:
        at = layout.mixture_of_layer(router.layer).routers[router.site]
        # The bits of float32, whatever the image's dtype.
        yield Rows(router.layer, router.weight.float().contiguous().view(dtype), at.start, at.stride)


def _site_of(pair: LowRankPair, layout: ImageLayout) -> SiteLayout:
    if pair.layer is None:
        return layout.model[pair.site]
    if pair.expert is None:
        return layout.of_layer(pair.layer)[pair.site]
    return layout.mixture_of_layer(pair.layer).experts[pair.expert][pair.site]


def _store_rows(target: _Integers, rows: Rows, dtype: torch.dtype) -> None:
    """Copy rows into ``target [count, stride * 128]``, the bits of ``dtype``, and zeros behind each."""
    # numpy transposes three to four times as fast as torch, on one thread, and its calls are quick; it has no bfloat16.
    inner = rows.count if rows.transposed else rows.width
    step = max(1, SERIAL_ELEMENTS // inner)
    length = rows.width if rows.transposed else rows.count
    for start in range(0, length, step):
        stop = min(start + step, length)
        values = rows.block(start, stop)
        block = as_integers(values if values.dtype == dtype else values.to(dtype))
        if rows.transposed:
            target[:, start:stop] = block.T
        else:
            target[start:stop, : rows.width] = block
    if rows.width < target.shape[1]:
        target[:, rows.width :] = 0


def _clear_the_rest(layer: _Integers, covered: list[tuple[int, int]]) -> None:
    """Fill with zeros what none of the spans of ``layer [elements]`` covers; no two overlap."""
    end = 0
    for start, stop in sorted(covered):
        layer[end:start] = 0
        end = stop
    layer[end:] = 0


def as_integers(tensor: torch.Tensor) -> _Integers:
    """The same memory as integers."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()
