"""The LoRA operators written out plainly: what ``lora.py`` must compute, row by row and site by site, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex.kernels.lora_plan import Segment
from loraplex.kernels.lora_rows import CHUNK, ResidentAdapter, SiteGroup, SiteLayoutLike

Matrices = tuple[torch.Tensor, torch.Tensor, float]
"""A [rank, in_features], B transposed [rank, out_features], scale."""


def add_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    segments: Sequence[Segment],
    group: SiteGroup,
    layer: int | None,
) -> torch.Tensor:
    """``y[row, site] + scale * B A x[row]`` for each row of each segment and each site that its adapter has.

    Args:
        y: [rows, sum of the group's out_features].
        x: [rows, in_features].
        arena: [num_layers, num_pages, page_elems].
        layer: of the group; None for model sites.

    Returns:
        [rows, sum of out_features] float64; ``y`` is left alone.
    """
    y, x = y.double(), x.double()
    for segment in segments:
        at = 0
        for site, width in zip(group.sites, group.out_features):
            found = read_site(arena, segment.adapter, site, group.in_features, width, layer)
            if found is not None:
                a, b, scale = found
                for row in range(segment.start, segment.stop):
                    y[row, at : at + width] += scale * (b.T @ (a @ x[row]))
            at += width
    return y


def add_embedding_lora_reference(
    y: torch.Tensor, tokens: torch.Tensor, arena: torch.Tensor, segments: Sequence[Segment], group: SiteGroup
) -> torch.Tensor:
    """``y[row] + scale * B A[:, tokens[row]]``, as a product with one-hot rows.

    Args:
        y: [rows, hidden].
        tokens: [rows] int64.
    """
    one_hot = torch.nn.functional.one_hot(tokens, group.in_features)
    return add_lora_reference(y, one_hot, arena, segments, group, None)


def read_site(
    arena: torch.Tensor, adapter: ResidentAdapter, site: str, in_features: int, out_features: int, layer: int | None
) -> Matrices | None:
    """The matrices of one site, read from the arena row by row; None where the adapter lacks the site."""
    layout = adapter.layout
    sites = layout.model if layer is None else layout.layouts[layout.layout_of_layer[layer]]
    if site not in sites:
        return None
    at: SiteLayoutLike = sites[site]
    a = [_read_row(arena, adapter.pages, layer, i, at.a_start, at.a_stride, in_features) for i in range(at.rank)]
    b = [_read_row(arena, adapter.pages, layer, i, at.b_start, at.b_stride, out_features) for i in range(at.rank)]
    return torch.stack(a).double(), torch.stack(b).double(), at.scale


def _read_row(
    arena: torch.Tensor, pages: Sequence[int], layer: int | None, row: int, start: int, stride: int, width: int
) -> torch.Tensor:
    """Row ``row`` of a matrix that starts at chunk ``start``; rows of model sites are dealt out over the layers."""
    if layer is None:
        row, layer = divmod(row, arena.shape[0])
    elements = []
    for chunk in range(start + row * stride, start + (row + 1) * stride):
        page, at = divmod(chunk * CHUNK, arena.shape[2])
        elements.append(arena[layer, pages[page], at : at + CHUNK])
    return torch.cat(elements)[:width]
