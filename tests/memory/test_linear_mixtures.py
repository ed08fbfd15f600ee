"""MoLA, LoRAMoE and MeteoRA: experts and a router of their own on each linear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import Routing

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = ["mola", "loramoe", "meteora"]
EXPERTS_ON = {
    "mola": ("q_proj", "down_proj"),
    "loramoe": ("gate_proj", "up_proj", "down_proj"),
    "meteora": ("q_proj", "v_proj", "up_proj"),
}


def refused(folder: Path, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert key in caught.value.message


def block(site: str) -> str:
    return "self_attn" if site in ATTENTION else "mlp"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_its_router_and_experts_as_the_keys_say(family, save_mixture, base_shape):
    folder = save_mixture(family, num_experts=3)
    tensors, spec = load_file(folder / TENSORS), read_adapter(folder, base_shape)
    assert (spec.kind, spec.warnings, spec.num_experts) == (family, (), 3)
    assert {(router.layer, router.site) for router in spec.routers} == {
        (layer, site) for layer in range(3) for site in EXPERTS_ON[family]
    }
    for router in spec.routers:
        key = f"{family}.layers.{router.layer}.{block(router.site)}.{router.site}.moe_gate.weight"
        assert torch.equal(router.weight, tensors[key])
        assert router.weight.shape == (3, base_shape.features(router.site)[0])
    for pair in spec.pairs:
        stem = f"{family}.layers.{pair.layer}.{block(pair.site)}.{pair.site}"
        stem += "" if pair.expert is None else f".experts.{pair.expert}"
        assert torch.equal(pair.a, tensors[f"{stem}.lora_A.weight"])
        assert torch.equal(pair.b, tensors[f"{stem}.lora_B.weight"])
        assert (pair.scale, pair.gain) == (1.5, None)


@pytest.mark.parametrize(
    ("family", "config", "routing"),
    [
        ("mola", {}, Routing("linear", 4, 2, renormalize=True)),
        ("mola", {"top_k": None}, Routing("linear", 4, 2, renormalize=True)),
        ("mola", {"top_k": 3, "routing_strategy": "mola"}, Routing("linear", 4, 3, renormalize=True)),
        ("meteora", {"top_k": 1}, Routing("linear", 4, 1, renormalize=True)),
        ("loramoe", {}, Routing("linear", 4, 4, renormalize=False)),
        ("loramoe", {"top_k": 1, "routing_strategy": "loramoe"}, Routing("linear", 4, 4, renormalize=False)),
    ],
)
def test_every_way_to_route_is_described(family, config, routing, save_mixture, base_shape):
    assert read_adapter(save_mixture(family, **config), base_shape).routing == routing


@pytest.mark.parametrize(
    ("family", "routing", "top_k"), [("mola", "top-k", 2), ("loramoe", "dense", 0), ("meteora", "top-k", 2)]
)
def test_the_description_agrees_with_the_full_read(family, routing, top_k, save_mixture, base_shape):
    folder = save_mixture(family, r=5)
    spec, summary = read_adapter(folder, base_shape), describe_adapter(folder)
    assert (summary.kind, summary.rank, summary.targets) == (spec.kind, spec.rank, spec.targets)
    assert (summary.num_experts, summary.routing, summary.top_k, summary.scope) == (4, routing, top_k, "linear")
    assert identity_of(folder) == spec.identity


@pytest.mark.parametrize("family", ["mola", "loramoe"])
def test_plain_pairs_stand_beside_linears_with_experts(family, save_mixture, base_shape):
    spec = read_adapter(save_mixture(family, experts_on=("up_proj",), plain_on=("q_proj", "o_proj")), base_shape)
    assert {(pair.site, pair.expert is None) for pair in spec.pairs} == {
        ("q_proj", True),
        ("o_proj", True),
        ("up_proj", False),
    }


def test_embedded_loras_may_differ_in_rank_and_scale(save_mixture, base_shape, edit_tensors):
    """As the LoRAs that MeteoRA embeds do."""
    folder = save_mixture("meteora", rank_pattern={r"experts\.1": 2}, alpha_pattern={"experts.1": 8, "experts.2": 4})

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if ".experts.1." in key:
                part = tensors[key][:2] if "lora_A" in key else tensors[key][:, :2]
                tensors[key] = part.contiguous()

    edit_tensors(folder, narrow)
    spec = read_adapter(folder, base_shape)
    assert {(pair.expert, pair.rank, pair.scale) for pair in spec.pairs} == {
        (0, 4, 1.5),
        (1, 2, 4.0),
        (2, 4, 1.0),
        (3, 4, 1.5),
    }


# Refusals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("r", None, "missing"),
        ("lora_alpha", None, "missing"),
        ("num_experts", None, "missing"),
        ("num_experts", -1, "integer from 1 to 256"),
        ("num_experts", 257, "integer from 1 to 256"),
        ("routing_strategy", "mixlora", "mixlora is not served for this peft_type"),
        ("use_dora", True, "DoRA in this kind of mixture is not served"),
        ("expert_lora", {"use_dora": True}, None),
        ("alora_invocation_tokens", [1], "activated mixture"),
        ("modules_to_save", ["lm_head"], "not served"),
        ("init_lora_weights", "olora", "Convert"),
    ],
)
def test_a_wrong_configuration_is_refused_by_key(family, key, value, match, save_mixture, base_shape):
    folder = save_mixture(family)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, key: value}))
    named = "use_dora" if match is None else key
    refused(folder, base_shape, f"{named} in .*{match or 'not served'}", named)


@pytest.mark.parametrize("family", ["mola", "meteora"])
@pytest.mark.parametrize("top_k", [0, 5, "2", 10**9])
def test_a_top_k_out_of_range_is_refused(family, top_k, save_mixture, base_shape):
    refused(save_mixture(family, top_k=top_k), base_shape, "integer from 1 to 4", "top_k")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_router_expert_or_half_is_refused_by_its_key(family, save_mixture, base_shape, edit_tensors):
    site = EXPERTS_ON[family][-1]
    stem = f"{family}.layers.2.{block(site)}.{site}"
    for number, (dropped, key, match) in enumerate(
        [
            (f"{stem}.moe_gate.weight", f"{stem}.moe_gate.weight", "needs this router"),
            (f"{stem}.experts.3", f"{stem}.experts.3.lora_A.weight", "needs all of 0 to 3"),
            (f"{stem}.experts.1.lora_B", f"{stem}.experts.1.lora_B.weight", "both of its halves"),
            (f"{stem}.experts", f"{stem}.moe_gate.weight", "a router without experts"),
        ]
    ):
        folder = save_mixture(family, name=f"mixture{number}")
        edit_tensors(folder, lambda t, start=dropped: [t.pop(name) for name in list(t) if name.startswith(start)])
        refused(folder, base_shape, match, key)
        with pytest.raises(AdapterFileError, match=match):
            describe_adapter(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_shapes_and_values_are_refused_by_key(family, save_mixture, base_shape, edit_tensors):
    site = EXPERTS_ON[family][0]
    stem, width = f"{family}.layers.0.{block(site)}.{site}", base_shape.features(site)[0]
    cases = [
        (f"{stem}.moe_gate.weight", torch.ones(5, width), rf"\[5, {width}\], expected \[4, {width}\]"),
        (f"{stem}.moe_gate.weight", torch.ones(4, width + 1), rf"expected \[4, {width}\]"),
        (f"{stem}.moe_gate.weight", torch.full((4, width), torch.inf), "infinite"),
        (f"{stem}.experts.0.lora_A.weight", torch.ones(5, width), rf"expected \[4, {width}\]"),
        (f"{stem}.experts.0.lora_A.weight", torch.full((4, width), torch.nan), "NaN"),
    ]
    for number, (key, tensor, match) in enumerate(cases):
        folder = save_mixture(family, name=f"mixture{number}")
        edit_tensors(folder, lambda t, key=key, tensor=tensor: t.update({key: tensor}))
        refused(folder, base_shape, match, key)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mola", "mola.layers.0.self_attn.q_proj.experts.0.lora_C.weight"),
        ("mola", "mixlora.layers.0.self_attn.q_proj.lora_A.weight"),
        ("mola", "mola.layers.0.mlp.moe_gate.weight"),
        ("mola", "mola.layers.0.self_attn.down_proj.moe_gate.weight"),
        ("loramoe", "loramoe.layers.0.self_attn.q_proj.experts.0.lora_A.weight"),
        ("meteora", "meteora.layers.0.self_attn.o_proj.lora_A.weight"),
        ("meteora", "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"),
    ],
)
def test_keys_that_the_family_does_not_have_are_refused(family, key, save_mixture, base_shape, edit_tensors):
    folder = save_mixture(family)
    edit_tensors(folder, lambda t: t.update({key: torch.ones(4, 32)}))
    refused(folder, base_shape, f"unknown tensor; expected {family}", key)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_are_refused(family, save_mixture, base_shape, base_weights):
    folder = save_mixture(family, magnitudes=True)
    with pytest.raises(AdapterFileError, match="lora_magnitude_vector: a magnitude of DoRA"):
        read_adapter(folder, base_shape, base_weights=base_weights)


def test_a_pair_beside_experts_on_one_linear_is_refused(save_mixture, base_shape):
    folder = save_mixture("mola", experts_on=("q_proj",), plain_on=("q_proj",))
    key = "mola.layers.0.self_attn.q_proj.lora_A.weight"
    refused(folder, base_shape, "a pair beside experts", key)


@pytest.mark.parametrize("family", ["mola", "loramoe"])
def test_plain_pairs_alone_are_no_mixture(family, save_mixture, base_shape):
    folder = save_mixture(family, experts_on=(), plain_on=("q_proj",))
    refused(folder, base_shape, "holds no experts", TENSORS)
