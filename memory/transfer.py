"""Paging in: an adapter image from the host store into its pages of the pool."""

from __future__ import annotations

import torch

from loraplex.memory.adapter_image import AdapterImage

_MAX_SLICES = 8
"""Up to so many runs of pages are copied as slices; with more of them one scatter is quicker."""


def page_in(image: AdapterImage, arena: torch.Tensor, pages: list[int]) -> None:
    """Copy an image into pages of the arena: one copy to its device and one scatter.

    Args:
        image: ``data [num_layers, n, page_elems]`` on the host.
        arena: [num_layers, num_pages, page_elems], same dtype, on any device.
        pages: the n pages, distinct; page ``i`` of the image goes to ``pages[i]`` in every layer. Ascending runs are
            copied as slices.

    On CUDA, from a pinned image, the copy is queued on the current stream and the call returns before it is done.
    Errors: ValueError where the shapes, the dtypes or the number of pages do not fit.
    """
    _check(image.data, arena, pages)
    data = image.data.to(arena.device, non_blocking=True)
    runs = _runs(pages)
    if len(runs) > _MAX_SLICES:
        arena.index_copy_(1, torch.tensor(pages, device=arena.device), data)
        return
    for start, stop in runs:
        first = pages[start]
        arena[:, first : first + stop - start].copy_(data[:, start:stop])


def _check(data: torch.Tensor, arena: torch.Tensor, pages: list[int]) -> None:
    layers, count, elems = data.shape
    if (layers, elems, data.dtype) != (arena.shape[0], arena.shape[2], arena.dtype):
        raise ValueError(
            f"an image {tuple(data.shape)} of {data.dtype} does not fit an arena {tuple(arena.shape)} of {arena.dtype}"
        )
    if len(pages) != count:
        raise ValueError(f"{len(pages)} pages for an image of {count}")
    if pages and not 0 <= min(pages) <= max(pages) < arena.shape[1]:
        raise ValueError(f"pages from {min(pages)} to {max(pages)}; the arena has 0 to {arena.shape[1] - 1}")


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """The maximal ``[start, stop)`` of positions whose pages follow one another."""
    breaks = [i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1]
    return [(a, b) for a, b in zip([0, *breaks], [*breaks, len(pages)], strict=True) if a < b]
