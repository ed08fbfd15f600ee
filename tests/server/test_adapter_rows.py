"""Which batches of adapters are kept from step to step, and which are made anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex.kernels.lora_plan import Segment
from loraplex.kernels.lora_rows import ResidentAdapter
from loraplex.memory.adapter_image import build_image
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair, Router, Routing, TokenRoutes
from loraplex.server.adapter_rows import AdapterRows, Assignment, PlacedRows, direct_adapter

TOKENS = np.arange(64)


def adapter(scope: str | None = None) -> ResidentAdapter:
    """With 4 experts on up_proj where there is a scope, else a plain pair."""
    experts = range(4) if scope else [None]
    pairs = [LowRankPair("up_proj", 0, torch.ones(2, 128), torch.ones(128, 2), 1.0, expert) for expert in experts]
    routing = Routing(scope, 4, 2, renormalize=True) if scope else None
    routers = (Router(0, "mlp", torch.ones(4, 128)),) if scope == "ffn" else ()
    routes = TokenRoutes(torch.ones(64, 2, dtype=torch.int16), torch.ones(64, 2)) if scope == "token" else None
    spec = AdapterSpec("id", "any", tuple(pairs), routers=routers, routing=routing, token_routes=routes)
    image = build_image(spec, 1, 1024, torch.float32)
    pages = list(range(image.num_pages))
    return ResidentAdapter(image.layout, pages, 8, 1, 16, image.routing, image.token_routes)


def make(rows: AdapterRows, *lengths: tuple[ResidentAdapter, int], base: int = 0):
    """A step of so many base rows and then so many rows under each adapter."""
    segments: list[Segment] = []
    placed: list[PlacedRows] = []
    start = base
    for one, length in lengths:
        assignment: Assignment = ((one, 1.0),)
        placed.append(PlacedRows(assignment, start, start + length))
        if direct_adapter(assignment) is not None:
            segments.append(Segment(one, start, start + length))
        start += length
    return rows.make(segments, placed, TOKENS)


@pytest.fixture
def rows() -> AdapterRows:
    return AdapterRows(torch.device("cpu"))


def test_a_step_like_the_last_one_keeps_its_batches(rows):
    one, mixture = adapter(), adapter("ffn")
    first, second = (make(rows, (one, 2), (mixture, 1)) for _ in range(2))
    assert first.direct is second.direct
    assert first.ffn is second.ffn


def test_rows_that_move_keep_the_experts_but_not_the_batch(rows):
    mixture = adapter("ffn")
    first, second = make(rows, (mixture, 2)), make(rows, (mixture, 2), base=1)
    assert first.ffn is not second.ffn
    assert first.ffn.units is second.ffn.units
    assert second.ffn.parts[0].rows.tolist() == [1, 2]


def test_an_adapter_that_leaves_keeps_the_others_experts_and_one_that_comes_does_not(rows):
    a, b, c = (adapter("ffn") for _ in range(3))
    both = make(rows, (a, 1), (b, 1)).ffn.units
    assert make(rows, (b, 1)).ffn.units is both
    assert make(rows, (a, 1), (c, 1)).ffn.units is not both


def test_units_of_adapters_long_gone_are_let_go(rows):
    adapters = [adapter("ffn") for _ in range(5)]
    many = make(rows, *[(one, 1) for one in adapters]).ffn.units
    assert make(rows, (adapters[0], 1), (adapters[1], 1)).ffn.units is not many


def test_a_step_without_the_kind_in_between_loses_nothing(rows):
    mixture, plain = adapter("ffn"), adapter()
    first = make(rows, (mixture, 2)).ffn
    assert make(rows, (plain, 1)).ffn is None
    assert make(rows, (mixture, 2)).ffn.units is first.units


def test_the_same_content_paged_in_again_is_another_adapter(rows):
    first, second = make(rows, (adapter("ffn"), 2)), make(rows, (adapter("ffn"), 2))
    assert first.ffn.units is not second.ffn.units


def test_token_routes_are_looked_up_anew_for_each_step(rows):
    by_token = adapter("token")
    by_token.token_routes.experts[1:] = torch.tensor([3, 2], dtype=torch.int16)
    first, second = make(rows, (by_token, 1)), make(rows, (by_token, 1), base=1)
    assert first.listed.units is second.listed.units
    assert first.listed.entries.units.tolist() == [1, 1]
    assert second.listed.entries.units.tolist() == [2, 3]


def test_base_rows_alone_make_nothing(rows):
    assert make(rows, base=3) is None
