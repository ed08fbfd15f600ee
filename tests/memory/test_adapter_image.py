"""Adapter images: every row is where the layout says, and nowhere else is anything."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.adapter_image import CHUNK, AdapterImage, SiteLayout, build_image, chunks_of, plan_layout
from loraplex.memory.adapter_spec import (
    LAYER_GROUPS,
    LAYER_SITES,
    MODEL_SITES,
    AdapterSpec,
    LowRankPair,
    Router,
    Routing,
    TokenRoutes,
)

PAGE_SIZES = st.sampled_from([CHUNK, 2 * CHUNK, 5 * CHUNK, 64 * CHUNK])


def pair(
    site: str,
    layer: int | None,
    rank: int,
    in_features: int,
    out_features: int,
    *,
    expert: int | None = None,
    gains: bool = False,
) -> LowRankPair:
    # Zeros mean "unused" below, so the rows hold none.
    a = torch.randint(1, 100, (rank, in_features)).float()
    b = torch.randint(1, 100, (out_features, rank)).float()
    gain = torch.randint(2, 9, (out_features,)).float() if gains else None
    return LowRankPair(site, layer, a, b, rank / 2, expert, gain)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[AdapterSpec, int]:
    """An adapter of any sites, ranks and widths, and the number of layers of its base."""
    num_layers = draw(st.integers(1, 4))
    width = st.sampled_from([1, 60, 127, 128, 129, 300])
    features = {site: (draw(width), draw(width)) for site in (*LAYER_SITES, *MODEL_SITES)}
    places = [(site, layer) for layer in range(num_layers) for site in LAYER_SITES]
    chosen = draw(st.lists(st.sampled_from(places + [(site, None) for site in MODEL_SITES]), min_size=1, unique=True))
    experts = st.lists(st.integers(0, 3), unique=True, min_size=1)
    pairs = [
        pair(site, layer, draw(st.integers(1, 6)), *features[site], expert=expert, gains=draw(st.booleans()))
        for site, layer in chosen
        for expert in (draw(st.one_of(st.just([None]), experts)) if layer is not None else [None])
    ]
    routed = sorted({(one.layer, one.site) for one in pairs if one.expert is not None})
    routers = [Router(layer, site, torch.rand(4, features[site][0]) + 0.1) for layer, site in routed]
    return AdapterSpec("identity", "any", tuple(pairs), routers=tuple(routers)), num_layers


def stored_rows(image: AdapterImage, layer: int | None, start: int, stride: int, count: int) -> torch.Tensor:
    """Rows [count, stride * CHUNK] read chunk by chunk through the pages, as a kernel does."""
    num_layers, _, page_elems = image.data.shape
    page_chunks = page_elems // CHUNK
    rows = []
    for row in range(count):
        in_layer, local = (layer, row) if layer is not None else (row % num_layers, row // num_layers)
        places = [divmod(start + local * stride + chunk, page_chunks) for chunk in range(stride)]
        rows.append(torch.cat([image.data[in_layer, page, at * CHUNK : (at + 1) * CHUNK] for page, at in places]))
    return torch.stack(rows)


def layout_of(image: AdapterImage, one: LowRankPair) -> SiteLayout:
    if one.layer is None:
        return image.layout.model[one.site]
    if one.expert is not None:
        return image.layout.mixture_of_layer(one.layer).experts[one.expert][one.site]
    return image.layout.of_layer(one.layer)[one.site]


@settings(deadline=None, max_examples=60)
@given(adapter=adapters(), page_elems=PAGE_SIZES)
def test_every_row_is_read_back_and_the_rest_is_zero(adapter, page_elems):
    spec, num_layers = adapter
    image = build_image(spec, num_layers, page_elems, torch.float32)
    for one in spec.pairs:
        site = layout_of(image, one)
        assert (site.rank, site.in_features, site.out_features) == (one.rank, one.a.shape[1], one.b.shape[0])
        assert site.scale == one.scale
        a = stored_rows(image, one.layer, site.a_start, site.a_stride, one.rank)
        b = stored_rows(image, one.layer, site.b_start, site.b_stride, one.rank)
        gain = 1.0 if one.gain is None else one.gain
        assert torch.equal(a[:, : site.in_features], one.a)
        assert torch.equal(b[:, : site.out_features], one.b.T * gain)
        assert not a[:, site.in_features :].any()
        assert not b[:, site.out_features :].any()
        assert (one.gain is None) == (site.gain_start is None)
        if one.gain is not None and site.gain_start is not None:
            row = stored_rows(image, one.layer or 0, site.gain_start, site.b_stride, 1)[0]
            assert torch.equal(row[: site.out_features], one.gain - 1)
    for router in spec.routers:
        at = image.layout.mixture_of_layer(router.layer).routers[router.site]
        rows = stored_rows(image, router.layer, at.start, at.stride, at.num_experts)
        assert torch.equal(rows[:, : at.in_features], router.weight)
    # As many elements are set as there are: rows overlap nowhere, and nothing else is written.
    gains = sum(one.gain.numel() for one in spec.pairs if one.gain is not None)
    weights = sum(router.weight.numel() for router in spec.routers)
    assert image.data.count_nonzero() == gains + weights + sum(one.a.numel() + one.b.numel() for one in spec.pairs)


@settings(deadline=None, max_examples=60)
@given(adapter=adapters(), page_elems=PAGE_SIZES)
def test_the_plan_alone_tells_the_size(adapter, page_elems):
    spec, num_layers = adapter
    image = build_image(spec, num_layers, page_elems, torch.bfloat16)
    assert image.layout == plan_layout(spec, num_layers, torch.bfloat16)
    assert image.data.shape == (num_layers, image.layout.num_pages(page_elems), page_elems)
    assert image.num_pages == image.data.shape[1]
    assert image.num_bytes == image.data.numel() * 2
    assert (image.num_pages - 1) * page_elems < image.layout.num_chunks * CHUNK <= image.num_pages * page_elems


@settings(deadline=None, max_examples=60)
@given(adapter=adapters())
def test_the_matrices_of_a_group_stand_together(adapter):
    spec, num_layers = adapter
    layout = plan_layout(spec, num_layers, torch.bfloat16)
    for layer in range(num_layers):
        for group in LAYER_GROUPS:
            sites = [layout.of_layer(layer)[site] for site in group if site in layout.of_layer(layer)]
            for one, following in pairwise(sites):
                assert following.a_start == one.a_start + one.rank * one.a_stride
                assert following.b_start == one.b_start + one.rank * one.b_stride
            if sites:
                assert sites[0].b_start == sites[-1].a_start + sites[-1].rank * sites[-1].a_stride


def test_layers_that_are_alike_share_one_layout():
    pairs = [pair(site, layer, 4, 96, 200) for layer in range(5) for site in ("q_proj", "v_proj")]
    layout = plan_layout(AdapterSpec("identity", "lora", tuple(pairs)), 5, torch.float32)
    assert len(layout.layouts) == 1
    assert layout.layout_of_layer == (0,) * 5


def test_a_layer_without_sites_has_an_empty_layout_and_no_cost():
    spec = AdapterSpec("identity", "lora", (pair("q_proj", 1, 4, 128, 128),))
    layout = plan_layout(spec, 3, torch.float32)
    assert layout.of_layer(0) == layout.of_layer(2) == {}
    assert layout.num_chunks == 8


def test_model_sites_are_striped_over_the_layers():
    spec = AdapterSpec("identity", "lora", (pair("lm_head", None, 6, 128, 1280),))
    assert plan_layout(spec, 4, torch.float32).num_chunks == 2 * (1 + 10)
    assert plan_layout(spec, 1, torch.float32).num_chunks == 6 * (1 + 10)


def test_fewer_rows_than_layers_leave_the_last_layers_empty():
    spec = AdapterSpec("identity", "lora", (pair("embed_tokens", None, 2, 300, 128),))
    image = build_image(spec, 4, CHUNK, torch.float32)
    assert [bool(image.data[layer].any()) for layer in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_values_are_rounded_once_to_the_served_dtype(stored):
    one = LowRankPair("q_proj", 0, torch.randn(3, 50).to(stored), torch.randn(70, 3).to(stored), 1.0)
    image = build_image(AdapterSpec("identity", "lora", (one,)), 1, CHUNK, torch.bfloat16)
    rows = stored_rows(image, 0, 0, 1, 3)
    assert torch.equal(rows[:, :50], one.a.bfloat16())


@pytest.mark.parametrize(("elements", "chunks"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2)])
def test_chunks_round_up(elements, chunks):
    assert chunks_of(elements) == chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_routers_stay_float32_whatever_the_dtype(dtype):
    router = Router(0, "mlp", torch.randn(3, 70))
    spec = AdapterSpec("identity", "mixlora", (pair("up_proj", 0, 2, 70, 90, expert=1),), routers=(router,))
    image = build_image(spec, 1, CHUNK, dtype)
    at = image.layout.mixture_of_layer(0).routers["mlp"]
    rows = stored_rows(image, 0, at.start, at.stride, 3).view(torch.float32)
    assert torch.equal(rows[:, :70], router.weight)


def test_an_image_carries_how_experts_are_chosen_and_counts_routes_by_token():
    routing = Routing("token", 4, 2, renormalize=True)
    routes = TokenRoutes(torch.zeros(50, 2, dtype=torch.int16), torch.zeros(50, 2))
    pairs = (pair("up_proj", 0, 2, 70, 90, expert=3),)
    spec = AdapterSpec("identity", "tokenwise", pairs, routing=routing, token_routes=routes, invocation=(5, 6))
    image = build_image(spec, 1, CHUNK, torch.float32)
    assert (image.routing, image.token_routes, image.invocation) == (routing, routes, (5, 6))
    assert image.num_bytes == image.data.nbytes + 50 * 2 * (2 + 4)
