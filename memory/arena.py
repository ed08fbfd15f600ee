"""The one allocation that K/V and adapters share: ``arena[num_layers, num_pages, page_elems]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.memory.adapter_image import CHUNK


@dataclass(frozen=True, slots=True)
class PageShape:
    """How large a page is. A page id names the same page in every layer.

    Attributes:
        page_tokens: tokens whose K/V a page holds.
        page_elems: elements of a page in one layer, ``page_tokens * 2 * kv_size``, a multiple of 128.
    """

    num_layers: int
    page_tokens: int
    page_elems: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return self.num_layers * self.page_elems * self.dtype.itemsize


def page_shape(num_layers: int, kv_size: int, page_tokens: int, dtype: torch.dtype) -> PageShape:
    """The page of a model.

    Args:
        kv_size: K/V heads times head dimension.
        page_tokens: at least this many tokens; raised until a page is a whole number of 128-element chunks.
    """
    while page_tokens * 2 * kv_size % CHUNK:
        page_tokens += 1
    return PageShape(num_layers, page_tokens, page_tokens * 2 * kv_size, dtype)


def allocate_arena(shape: PageShape, num_pages: int, device: torch.device) -> torch.Tensor:
    """[num_layers, num_pages, page_elems], uninitialised."""
    return torch.empty((shape.num_layers, num_pages, shape.page_elems), dtype=shape.dtype, device=device)


def poison(arena: torch.Tensor, pages: Sequence[int]) -> None:
    """Fill freed pages with NaN, so that whoever reads a page it does not own shows it. For tests."""
    arena[:, torch.tensor(pages, dtype=torch.int64, device=arena.device)] = float("nan")
