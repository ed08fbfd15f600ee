"""What a neutral description tells of an adapter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import LAYER_SITES, AdapterSpec, LowRankPair, Router

LAYERS = 4


def spec_of(*places, routers=()):
    pairs = tuple(
        LowRankPair(site, layer, torch.ones(1, 8), torch.ones(8, 1), 1.0, *expert) for site, layer, *expert in places
    )
    return AdapterSpec("identity", "any", pairs, routers=tuple(Router(*place, torch.ones(2, 8)) for place in routers))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (spec_of(("embed_tokens", None), ("q_proj", 3)), 0),
        (spec_of(("lm_head", None)), LAYERS),
        (spec_of(("lm_head", None), ("q_proj", 1)), 2),
        (spec_of(("k_proj", 2)), 2),
        (spec_of(("v_proj", 2), ("q_proj", 2)), 2),
        (spec_of(("v_proj", 0)), 0),
        (spec_of(("q_proj", 0)), 1),
        (spec_of(("q_proj", 3)), LAYERS),
        (spec_of(("down_proj", 1), ("k_proj", 2)), 2),
        (spec_of(("v_proj", 1, 3)), 1),
        (spec_of(("up_proj", 2), routers=[(1, "mlp")]), 2),
        (spec_of(("up_proj", 2), routers=[(1, "k_proj")]), 1),
        (spec_of(), LAYERS),
    ],
)
def test_keys_and_values_are_the_bases_below_the_first_layer_that_the_adapter_touches(spec, expected):
    assert spec.first_kv_layer(LAYERS) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LAYER_SITES), st.integers(0, LAYERS - 1)), min_size=1, unique=True))
def test_one_more_matrix_never_leaves_more_layers_alone(places):
    firsts = [spec_of(*places[:count]).first_kv_layer(LAYERS) for count in range(1, len(places) + 1)]
    assert firsts == sorted(firsts, reverse=True)
    assert 0 <= firsts[-1] <= LAYERS


def test_what_the_layer_says_holds_in_a_model(save_peft, base_shape, make_base):
    """Keys and values of the layers below equal the base's to the last bit, those of that layer do not."""
    ids = torch.arange(1, 12)[None]
    for options in ({"target_modules": r".*layers\.1\.self_attn\.q_proj"}, {"target_modules": r".*layers\.1.*v_proj"}):
        folder, model = save_peft(name=str(len(options["target_modules"])), **options)
        first = read_adapter(folder, base_shape).first_kv_layer(base_shape.num_layers)
        with torch.no_grad():
            adapted = model(ids, use_cache=True).past_key_values
            base = make_base()(ids, use_cache=True).past_key_values
        same = [
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(adapted.layers, base.layers, strict=True)
        ]
        assert same == [layer < first for layer in range(base_shape.num_layers)]
