"""Adapters of any shape laid out in an arena whose other pages are NaN, and how close two results must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from loraplex.kernels.lora_plan import SHORT_SEGMENT_ROWS, Segment
from loraplex.kernels.lora_rows import ResidentAdapter, SiteGroup
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair
from loraplex.memory.transfer import page_in

CPU = torch.device("cpu")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 7e-4, torch.bfloat16: 6e-3}
"""Relative RMS error allowed by dtype: about twice the rounding of the result and of the low-rank intermediate."""


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    wide, exact = actual.double(), expected.double()
    return float((wide - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@dataclass
class Widths:
    """Dimensions of a decoder: its groups of sites."""

    hidden: int = 100
    kv: int = 64
    ffn: int = 128
    vocab: int = 300

    @property
    def groups(self) -> dict[str, SiteGroup]:
        return {
            "qkv": SiteGroup(("q_proj", "k_proj", "v_proj"), self.hidden, (self.hidden, self.kv, self.kv)),
            "o": SiteGroup(("o_proj",), self.hidden, (self.hidden,)),
            "gate_up": SiteGroup(("gate_proj", "up_proj"), self.hidden, (self.ffn, self.ffn)),
            "down": SiteGroup(("down_proj",), self.ffn, (self.hidden,)),
        }

    @property
    def lm_head(self) -> SiteGroup:
        return SiteGroup(("lm_head",), self.hidden, (self.vocab,))

    @property
    def embedding(self) -> SiteGroup:
        return SiteGroup(("embed_tokens",), self.vocab, (self.hidden,))

    def features(self, site: str) -> tuple[int, int]:
        for group in (*self.groups.values(), self.lm_head, self.embedding):
            if site in group.sites:
                return group.in_features, group.out_features[group.sites.index(site)]
        raise KeyError(site)


ALL_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")


@dataclass
class LoraPool:
    """An arena, NaN but for the adapters loaded into it.

    Attributes:
        scattered: page lists are random; else each adapter lies in one run.
    """

    widths: Widths = field(default_factory=Widths)
    dtype: torch.dtype = torch.float32
    page_tokens: int = 16
    scattered: bool = True
    num_layers: int = 3
    num_pages: int = 1200
    device: torch.device = CPU
    arena: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(7)
        page_elems = self.page_tokens * 2 * 64
        shape = (self.num_layers, self.num_pages, page_elems)
        self.arena = torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)
        order = np.random.default_rng(5).permutation(self.num_pages) if self.scattered else np.arange(3, self.num_pages)
        self._free: list[int] = order.tolist()

    def load(
        self, ranks: int | Mapping[str, int], *, layers: Iterable[int] | None = None, scale: float = 0.7
    ) -> ResidentAdapter:
        """An adapter with random weights.

        Args:
            ranks: by site, or one for all sites.
            layers: that it adapts; all by default.
        """
        by_site = dict.fromkeys(ALL_SITES, ranks) if isinstance(ranks, int) else ranks
        adapted = list(range(self.num_layers) if layers is None else layers)
        pairs = [
            self._pair(site, layer, rank, scale * (1 + i / 8))
            for i, (site, rank) in enumerate(by_site.items())
            for layer in ([None] if site in ("lm_head", "embed_tokens") else adapted)
        ]
        image = build_image(AdapterSpec("id", "lora", tuple(pairs)), self.num_layers, self.arena.shape[2], self.dtype)
        pages, self._free = self._free[: image.num_pages], self._free[image.num_pages :]
        assert len(pages) == image.num_pages, "the pool of this test is too small"
        page_in(image, self.arena, pages)
        return ResidentAdapter(image.layout, pages, self.arena.shape[2] // 128, self.num_layers, self.num_pages)

    def _pair(self, site: str, layer: int | None, rank: int, scale: float) -> LowRankPair:
        in_features, out_features = self.widths.features(site)
        a, b = self.draw(rank, in_features) / in_features**0.5, self.draw(out_features, rank) / rank**0.5
        return LowRankPair(site, layer, a, b, scale)

    def draw(self, *shape: int) -> torch.Tensor:
        """Random numbers on the host, where adapters are read."""
        return torch.from_numpy(self._random.standard_normal(shape)).to(self.dtype)

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers on the device."""
        return self.draw(*shape).to(self.device)

    def tokens(self, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._random.integers(0, self.widths.vocab, rows)

    def chunks(self, layer: int | None) -> torch.Tensor:
        return (self.arena if layer is None else self.arena[layer]).view(-1, 128)


def segments_of(base_rows: int, rows_by_adapter: Iterable[tuple[ResidentAdapter, int]]) -> list[Segment]:
    """Segments behind the base-only rows, short ones first, as a step arranges them."""
    found: list[Segment] = []
    start = base_rows
    for adapter, rows in sorted(rows_by_adapter, key=lambda item: item[1] > SHORT_SEGMENT_ROWS):
        found.append(Segment(adapter, start, start + rows))
        start += rows
    return found


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors this small are slower on two threads, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def pool_device() -> torch.device:
    """Where pools lie: plain operators are tested on the CPU."""
    return CPU


@pytest.fixture
def make_pool(pool_device: torch.device) -> Callable[..., LoraPool]:
    return partial(LoraPool, device=pool_device)


@pytest.fixture
def make_widths() -> type[Widths]:
    return Widths


@pytest.fixture
def make_segments() -> Callable[..., list[Segment]]:
    return segments_of


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Fails where the relative RMS error is above the tolerance of the result's dtype, or anything is NaN."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        error = relative_rms(actual, expected)
        assert error <= TOLERANCE[actual.dtype], f"relative RMS error {error:.2e} in {actual.dtype}"

    return check


@pytest.fixture
def rms() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_rms


@pytest.fixture
def check_operator(device: torch.device) -> Callable[[str, tuple[Any, ...]], None]:
    """Fails where an operator of ours, called with these arguments on the device, breaks what torch asks of one."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")

    def check(name: str, arguments: tuple[Any, ...]) -> None:
        placed = tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, arguments)
        torch.library.opcheck(getattr(torch.ops.loraplex, name).default, placed, test_utils=checks)

    return check
