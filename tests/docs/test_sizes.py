"""The numbers of the page on operations are those that the code gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from loraplex.memory.adapter_image import plan_layout
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair
from loraplex.memory.arena import PageShape, page_shape
from loraplex.server.settings import Settings

MIB, GIB = 1 << 20, 1 << 30
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"q v": ("q_proj", "v_proj"), "q k v o": ATTENTION}
PAGE_TOKENS = Settings.model_fields["page_tokens"].default


@dataclass(frozen=True)
class Shape:
    """What of a model decides how large its adapters are."""

    layers: int
    hidden: int
    kv: int
    inner: int

    def sites(self, names: tuple[str, ...] | None) -> dict[str, tuple[int, int]]:
        """Input and output features of the named linears of a layer, or of all."""
        hidden, kv, inner = self.hidden, self.kv, self.inner
        found = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
        found |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        return {name: found[name] for name in names or found}

    @property
    def page(self) -> PageShape:
        return page_shape(self.layers, self.kv, PAGE_TOKENS, torch.bfloat16)

    def pages(self, rank: int, names: tuple[str, ...] | None) -> int:
        """Pages that an adapter takes."""
        spec = AdapterSpec(
            identity="",
            kind="lora",
            pairs=tuple(
                LowRankPair(
                    layer=layer,
                    site=site,
                    a=torch.empty((rank, features[0]), device="meta"),
                    b=torch.empty((features[1], rank), device="meta"),
                    scale=1.0,
                )
                for layer in range(self.layers)
                for site, features in self.sites(names).items()
            ),
        )
        return plan_layout(spec, self.layers, torch.bfloat16).num_pages(self.page.page_elems)


MODELS = {
    "Llama 3.2 1B": Shape(16, 2048, 512, 8192),
    "Llama 3.1 8B": Shape(32, 4096, 1024, 14336),
    "Qwen 2.5 7B": Shape(28, 3584, 512, 18944),
}


@pytest.fixture(scope="module")
def operations(markdown: Any) -> Any:
    return markdown.read_page(markdown.ROOT / "docs" / "operations.md")


def rows_of(page: Any, width: int, model: bool = True) -> list[tuple[str, ...]]:
    return [cells for _, cells in page.rows if len(cells) == width and (cells[0] in MODELS) is model]


def test_pages_of_models_are_as_told(operations: Any) -> None:
    rows = rows_of(operations, 3)
    assert {cells[0] for cells in rows} == set(MODELS)
    for name, page_bytes, tokens in rows:
        page = MODELS[name].page
        assert page_bytes == f"{page.page_bytes / 1024:.0f} KiB"
        assert int(tokens.replace(",", "")) == GIB // page.page_bytes * page.page_tokens


def test_pages_of_adapters_are_as_told(operations: Any) -> None:
    rows = rows_of(operations, 6)
    assert len(rows) >= 9
    for name, targets, rank, pages, size, count in rows:
        model = MODELS[name]
        expected = model.pages(int(rank), TARGETS.get(targets))
        assert int(pages.replace(",", "")) == expected, (name, targets, rank)
        assert size == f"{expected * model.page.page_bytes / MIB:.1f} MiB"
        assert int(count.replace(",", "")) == GIB // (expected * model.page.page_bytes)


def test_the_formula_of_the_page_gives_the_same(operations: Any) -> None:
    """pages = ceil(rank * sum(in + out, each to 128) / page elements)."""
    for name, targets, rank, pages, *_ in rows_of(operations, 6):
        model = MODELS[name]
        elements = sum(-(-size // 128) * 128 for pair in model.sites(TARGETS.get(targets)).values() for size in pair)
        assert int(pages.replace(",", "")) == -(-int(rank) * elements // model.page.page_elems)


def test_the_worked_example_adds_up(operations: Any) -> None:
    text = " ".join(operations.path.read_text(encoding="utf-8").split())
    pool = re.search(r"pool of (\d+) GiB is ([\d,]+) pages", text)
    assert pool
    model = MODELS["Llama 3.1 8B"]
    pages = int(pool[1]) * GIB // model.page.page_bytes
    assert int(pool[2].replace(",", "")) == pages
    hot = re.search(r"(\d+) hot adapters of rank (\d+) on q k v o take ([\d,]+) pages", text)
    assert hot
    adapters = int(hot[1]) * model.pages(int(hot[2]), ATTENTION)
    assert int(hot[3].replace(",", "")) == adapters
    rest = re.search(r"leaves ([\d,]+) pages, K/V of ([\d,]+) tokens", text)
    assert rest
    assert int(rest[1].replace(",", "")) == pages - adapters
    assert int(rest[2].replace(",", "")) == (pages - adapters) * PAGE_TOKENS
    host = re.search(r"the default holds (\d+) adapters of 26 MiB", text)
    assert host
    assert model.pages(16, ATTENTION) * model.page.page_bytes == 26 * MIB
    assert int(host[1]) == int(Settings.model_fields["host_adapter_bytes"].default) // (26 * MIB)
