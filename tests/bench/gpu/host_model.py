"""The host's side of an engine without a device: pages, adapters by their layouts, and the kernels' table of them."""

from __future__ import annotations

import checkout  # noqa: F401  (before anything of loraplex)
import torch
from costs import ModelShape

from loraplex.kernels.adapter_table import AdapterTable
from loraplex.kernels.lora_rows import ResidentAdapter, SiteGroup
from loraplex.memory.adapter_image import ImageLayout, plan_layout
from loraplex.memory.adapter_spec import LAYER_GROUPS, MODEL_GROUPS, AdapterSpec
from loraplex.memory.arena import PageShape, page_shape

CPU = torch.device("cpu")
PAGE_TOKENS = 16


def layer_groups(shape: ModelShape) -> list[SiteGroup]:
    """The groups of a layer's sites, each with its widths."""
    return [_group(group, shape.sites) for group in LAYER_GROUPS]


def _model_groups(shape: ModelShape) -> list[SiteGroup]:
    sites = {"lm_head": (shape.hidden, shape.vocabulary), "embed_tokens": (shape.vocabulary, shape.hidden)}
    return [_group(group, sites) for group in MODEL_GROUPS]


def _group(names: tuple[str, ...], sites: dict[str, tuple[int, int]]) -> SiteGroup:
    return SiteGroup(names, sites[names[0]][0], tuple(sites[name][1] for name in names))


class HostModel:
    """Adapters that have places in a pool and entries in a table, and no numbers anywhere.

    Args:
        shape: of the model.
        dtype: of its arena.
        num_pages: of its pool.
        device: of the table.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        dtype: torch.dtype = torch.bfloat16,
        num_pages: int = 1 << 20,
        device: torch.device = CPU,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.pages: PageShape = page_shape(shape.layers, shape.kv_heads * shape.head_dim, PAGE_TOKENS, dtype)
        self.num_pages = num_pages
        self.groups = layer_groups(shape)
        self.table = AdapterTable(
            self.groups,
            _model_groups(shape),
            num_layers=shape.layers,
            page_chunks=self.pages.page_elems // 128,
            device=device,
        )
        self._next_page = 0

    def layout(self, spec: AdapterSpec) -> ImageLayout:
        """Where an adapter's rows lie in its image."""
        return plan_layout(spec, self.shape.layers, self.dtype)

    def pages_of(self, layout: ImageLayout) -> int:
        """Pages of an adapter of a layout."""
        return layout.num_pages(self.pages.page_elems)

    def resident(self, layout: ImageLayout, spec: AdapterSpec, pages: list[int] | None = None) -> ResidentAdapter:
        """An adapter in these pages, or in the next ones, and in the table."""
        if pages is None:
            count = self.pages_of(layout)
            pages = list(range(self._next_page, self._next_page + count))
            self._next_page += count
        page_chunks = self.pages.page_elems // 128
        adapter = ResidentAdapter(layout, pages, page_chunks, self.shape.layers, self.num_pages, spec.routing)
        self.table.add(adapter)
        return adapter
