"""Adapter images: the bytes of an adapter laid out page by page, as they will lie in the pool.

A page id names the same page in every layer, so an image is ``[num_layers, num_pages, page_elems]`` and an adapter has
one page list. Within a layer, the rank rows of every adapted site follow one another, by groups of sites that read the
same input: first each site's A as ``[rank, in]`` (so that a group's A is one matrix), then each site's B transposed as
``[rank, out]``. Every row starts on a chunk boundary (128 elements), so a chunk never straddles pages. Rows of sites
that belong to no layer are dealt out over the layers in turn, behind the layers' own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from loraplex.memory.adapter_spec import LAYER_GROUPS, MODEL_GROUPS, AdapterSpec, LowRankPair

CHUNK = 128
"""Elements of the smallest unit that kernels address; rows are aligned to it."""

_SERIAL_ELEMENTS = 32_768
"""torch shares out larger copies to its threads; a loader that waits for them, while the model keeps them busy, takes
ten times as long."""


def chunks_of(elements: int) -> int:
    """Chunks that hold this many elements."""
    return -(-elements // CHUNK)


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """Where one low-rank pair lies in an image; all positions are in chunks from the image's start in a layer.

    Row ``i`` of A starts at ``a_start + i * a_stride``; row ``i`` of B transposed at ``b_start + i * b_stride``. For a
    model site, row ``i`` lies in layer ``i % num_layers`` at ``start + (i // num_layers) * stride``.
    """

    rank: int
    in_features: int
    out_features: int
    a_start: int
    b_start: int
    scale: float

    @property
    def a_stride(self) -> int:
        return chunks_of(self.in_features)

    @property
    def b_stride(self) -> int:
        return chunks_of(self.out_features)


LayerLayout = Mapping[str, SiteLayout]


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where everything of an adapter lies.

    Attributes:
        layouts: the distinct layer layouts. Most adapters have one; a layer without any adapted site has an empty one.
        layout_of_layer: for each layer, its index into ``layouts``.
        model: layout of the model sites.
        num_chunks: chunks used in each layer.
    """

    layouts: tuple[LayerLayout, ...]
    layout_of_layer: tuple[int, ...]
    model: LayerLayout
    num_chunks: int

    def of_layer(self, layer: int) -> LayerLayout:
        return self.layouts[self.layout_of_layer[layer]]

    def num_pages(self, page_elems: int) -> int:
        """Pages that the image takes where a page has ``page_elems`` elements per layer."""
        return -(-self.num_chunks * CHUNK // page_elems)


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter ready to be paged in: one copy and one scatter.

    Attributes:
        identity: of the adapter (see ``AdapterSpec``).
        layout: where its rows lie.
        data: [num_layers, num_pages, page_elems] in the model's dtype, on the host; unused elements are zero.
    """

    identity: str
    kind: str
    layout: ImageLayout
    data: torch.Tensor

    @property
    def num_pages(self) -> int:
        return self.data.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def plan_layout(spec: AdapterSpec, num_layers: int) -> ImageLayout:
    """Decide where each row of an adapter lies."""
    by_layer: list[dict[str, LowRankPair]] = [{} for _ in range(num_layers)]
    model_pairs: dict[str, LowRankPair] = {}
    for pair in spec.pairs:
        (model_pairs if pair.layer is None else by_layer[pair.layer])[pair.site] = pair

    layouts: list[LayerLayout] = []
    layout_of_layer: list[int] = []
    used = 0
    for pairs in by_layer:
        layout, end = _lay_out(pairs, LAYER_GROUPS, start=0, rows_share=1)
        used = max(used, end)
        if layout not in layouts:
            layouts.append(layout)
        layout_of_layer.append(layouts.index(layout))
    model, used = _lay_out(model_pairs, MODEL_GROUPS, start=used, rows_share=num_layers)
    return ImageLayout(tuple(layouts), tuple(layout_of_layer), model, used)


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
        for pair, a_start, b_start in zip(present, a_starts, b_starts):
            (rank, in_features), out_features = pair.a.shape, pair.b.shape[0]
            layout[pair.site] = SiteLayout(rank, in_features, out_features, a_start, b_start, pair.scale)
        start = b_starts[-1]
    return layout, start


def build_image(
    spec: AdapterSpec, num_layers: int, page_elems: int, dtype: torch.dtype, *, pin_memory: bool = False
) -> AdapterImage:
    """Lay an adapter out in page order in host memory."""
    layout = plan_layout(spec, num_layers)
    num_pages = layout.num_pages(page_elems)
    data = torch.zeros((num_layers, num_pages, page_elems), dtype=dtype, pin_memory=pin_memory)
    chunks = data.view(num_layers, -1, CHUNK)
    for pair in spec.pairs:
        sites = layout.model if pair.layer is None else layout.of_layer(pair.layer)
        site = sites[pair.site]
        for rows, start, stride in (
            (pair.a, site.a_start, site.a_stride),
            (pair.b.T, site.b_start, site.b_stride),
        ):
            if pair.layer is None:
                for layer in range(min(num_layers, rows.shape[0])):
                    _store_rows(chunks[layer], rows[layer::num_layers], start, stride)
            else:
                _store_rows(chunks[pair.layer], rows, start, stride)
    return AdapterImage(spec.identity, spec.kind, layout, data)


def _store_rows(chunks: torch.Tensor, rows: torch.Tensor, start: int, stride: int) -> None:
    """Copy ``rows [n, width]`` into ``chunks [c, 128]`` from chunk ``start``, each row padded to ``stride`` chunks."""
    count, width = rows.shape
    stored = chunks[start : start + count * stride].view(count, stride * CHUNK)[:, :width]
    block = max(1, _SERIAL_ELEMENTS // width)
    for target, source in zip(stored.split(block), rows.split(block)):
        target.copy_(source)
