"""MixLoRA: every naming generation, option and refusal."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import AdapterSpec, Routing

TENSORS = "adapter_model.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_SITES = ("gate_proj", "up_proj", "down_proj")
NAMINGS = ["modern", "package", "oldest", "alias"]


def refused(folder: Path, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert key in caught.value.message


def content(spec: AdapterSpec) -> dict[tuple[Any, ...], torch.Tensor]:
    """Every number of a description, by what it is."""
    numbers = {(router.layer, router.site, "router"): router.weight for router in spec.routers}
    for pair in spec.pairs:
        numbers |= {
            (pair.layer, pair.site, pair.expert, "A"): pair.a,
            (pair.layer, pair.site, pair.expert, "B"): pair.b,
        }
    return numbers


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_generation_of_names_reads_as_the_same_mixture(naming, save_mixture, base_shape):
    modern = read_adapter(save_mixture("mixlora", name="modern"), base_shape)
    spec = read_adapter(save_mixture("mixlora", naming=naming), base_shape)
    ours, theirs = content(spec), content(modern)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[what], theirs[what]) for what in ours)
    assert (spec.kind, spec.routing, spec.warnings) == ("mixlora", modern.routing, ())


@pytest.mark.parametrize("naming", NAMINGS)
def test_each_number_stands_where_its_key_says(naming, save_mixture, base_shape):
    folder = save_mixture("mixlora", naming=naming)
    tensors = load_file(folder / TENSORS)
    numbers = content(read_adapter(folder, base_shape))
    expert_key = {
        "modern": "mixlora.layers.1.mlp.down_proj.experts.3.lora_B.weight",
        "package": "mixlora.layers.1.experts.3.down_proj.lora_B.weight",
        "oldest": "mixlora.layers.1.experts.3.w2_proj.lora_B.weight",
        "alias": "mixlora.layers.1.mlp.experts.3.down_proj.lora_B.weight",
    }[naming]
    gate_key = (
        "mixlora.layers.2.gate.weight" if naming in ("package", "oldest") else "mixlora.layers.2.mlp.moe_gate.weight"
    )
    assert torch.equal(numbers[1, "down_proj", 3, "B"], tensors[expert_key])
    assert torch.equal(numbers[2, "mlp", "router"], tensors[gate_key])
    plain = tensors["mixlora.layers.0.self_attn.o_proj.lora_A.weight"]
    assert torch.equal(numbers[0, "o_proj", None, "A"], plain)


def test_the_oldest_names_of_gate_and_up_are_not_swapped(save_mixture, base_shape):
    folder = save_mixture("mixlora", naming="oldest")
    tensors, numbers = load_file(folder / TENSORS), content(read_adapter(folder, base_shape))
    assert torch.equal(numbers[0, "gate_proj", 0, "A"], tensors["mixlora.layers.0.experts.0.w1_proj.lora_A.weight"])
    assert torch.equal(numbers[0, "up_proj", 0, "A"], tensors["mixlora.layers.0.experts.0.w3_proj.lora_A.weight"])


def test_there_is_one_router_per_layer_and_all_experts_on_every_site(save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", num_experts=3), base_shape)
    assert [(router.layer, router.site, tuple(router.weight.shape)) for router in spec.routers] == [
        (layer, "mlp", (3, 32)) for layer in range(3)
    ]
    experts = {(pair.layer, pair.site, pair.expert) for pair in spec.pairs if pair.expert is not None}
    assert experts == set(itertools.product(range(3), FFN_SITES, range(3)))
    assert {pair.site for pair in spec.pairs if pair.expert is None} == set(ATTENTION)
    assert spec.num_experts == 3


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (8, 8)])
def test_any_number_of_experts_is_read(num_experts, top_k, save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", num_experts=num_experts, top_k=top_k), base_shape)
    assert spec.routing == Routing("ffn", num_experts, top_k, renormalize=True)
    assert {pair.expert for pair in spec.pairs} == {None, *range(num_experts)}


def test_two_of_one_expert_are_refused_although_two_is_the_default(save_mixture, base_shape):
    refused(save_mixture("mixlora", num_experts=1, top_k=None), base_shape, "from 1 to 1, got 2", "top_k")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_keep_the_dtype_in_which_they_were_stored(dtype, save_mixture, base_shape, base_weights, edit_tensors):
    folder = save_mixture("mixlora", use_dora=True, magnitudes=True)
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    assert {number.dtype for number in content(spec).values()} == {dtype}
    assert {pair.gain.dtype for pair in spec.pairs if pair.gain is not None} == {torch.float32}


ROUTINGS = [
    ({"routing_strategy": "mixlora"}, Routing("ffn", 4, 2, renormalize=True)),
    ({"routing_strategy": "mixtral", "top_k": 1}, Routing("ffn", 4, 1, renormalize=True)),
    ({"routing_strategy": "mixlora", "top_k": None}, Routing("ffn", 4, 2, renormalize=True)),
    ({"routing_strategy": "mixlora", "top_k": 4}, Routing("ffn", 4, 4, renormalize=True)),
    ({"routing_strategy": "mixlora-dynamic"}, Routing("ffn", 4, 4, renormalize=False, top_p=0.8)),
    (
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.5, "temperature": 2},
        Routing("ffn", 4, 4, renormalize=False, top_p=0.5, temperature=2.0),
    ),
    ({"routing_strategy": "mixlora-switch", "top_k": 3}, Routing("ffn", 4, 1, renormalize=False)),
    ({"routing_strategy": "switch"}, Routing("ffn", 4, 1, renormalize=False)),
    ({"act_fn": "silu"}, Routing("ffn", 4, 2, renormalize=True, activation="silu")),
    ({"act_fn": "swish"}, Routing("ffn", 4, 2, renormalize=True, activation="silu")),
    ({"act_fn": "gelu_new"}, Routing("ffn", 4, 2, renormalize=True, activation="gelu_new")),
]


@pytest.mark.parametrize(("config", "routing"), ROUTINGS)
def test_every_way_to_route_is_described(config, routing, save_mixture, base_shape):
    assert read_adapter(save_mixture("mixlora", **config), base_shape).routing == routing


@pytest.mark.parametrize("act_fn", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_keep_their_names(act_fn, save_mixture, base_shape):
    routing = read_adapter(save_mixture("mixlora", act_fn=act_fn), base_shape).routing
    assert routing is not None
    assert routing.activation == act_fn


@pytest.mark.parametrize(
    ("strategy", "routing", "top_k"),
    [("mixlora", "top-k", 2), ("mixlora-dynamic", "dynamic", 0), ("mixlora-switch", "switch", 1)],
)
def test_the_description_agrees_with_the_full_read(strategy, routing, top_k, save_mixture, base_shape):
    folder = save_mixture("mixlora", routing_strategy=strategy, expert_lora={"r": 7}, expert_rank=7)
    spec, summary = read_adapter(folder, base_shape), describe_adapter(folder)
    assert (summary.kind, summary.rank, summary.targets) == (spec.kind, spec.rank, spec.targets)
    assert (summary.num_experts, summary.routing, summary.top_k, summary.scope) == (4, routing, top_k, "ffn")
    assert summary.num_tensors == 3 * (4 * 2 + 3 * 4 * 2 + 1)
    assert identity_of(folder) == spec.identity


def test_a_bin_is_described_by_its_configuration(save_mixture, base_shape):
    folder = save_mixture("mixlora", target_modules=["w1_proj", "w2_proj", "q_proj"])
    before = read_adapter(folder, base_shape)
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    summary = describe_adapter(folder)
    assert (summary.rank, summary.targets) == (4, ("q_proj", "gate_proj", "down_proj"))
    spec = read_adapter(folder, base_shape, allow_bin=True)
    assert all(torch.equal(content(spec)[what], number) for what, number in content(before).items())
    assert identity_of(folder, allow_bin=True) == spec.identity
    with pytest.raises(AdapterFileError, match="pickled weights are not read"):
        identity_of(folder)


# Scales


def scales(spec: AdapterSpec) -> tuple[set[float], set[float]]:
    """Of plain pairs and of experts."""
    return (
        {pair.scale for pair in spec.pairs if pair.expert is None},
        {pair.scale for pair in spec.pairs if pair.expert is not None},
    )


@pytest.mark.parametrize(
    ("config", "plain", "expert"),
    [
        ({}, 6 / 4, 6 / 4),
        ({"use_rslora": True}, 6 / 2, 6 / 2),
        ({"expert_lora": {}}, 6 / 4, 6 / 4),
        ({"expert_lora": None}, 6 / 4, 6 / 4),
        ({"expert_lora": {"lora_alpha": 9}}, 6 / 4, 9 / 4),
        ({"expert_lora": {"use_rslora": True}}, 6 / 4, 6 / 2),
        ({"use_rslora": True, "expert_lora": {"use_rslora": False}}, 6 / 2, 6 / 4),
        ({"expert_lora": {"r": 9}, "expert_rank": 9}, 6 / 4, 6 / 9),
        ({"expert_lora": {"r": 9, "lora_alpha": 5, "use_rslora": True}, "expert_rank": 9}, 6 / 4, 5 / 3),
    ],
)
def test_experts_take_what_expert_lora_sets_over_the_rest(config, plain, expert, save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", **config), base_shape)
    assert scales(spec) == ({plain}, {expert})


def test_patterns_find_sites_and_single_experts(save_mixture, base_shape):
    spec = read_adapter(
        save_mixture("mixlora", alpha_pattern={r"up_proj\.experts\.2": 40, "up_proj": 20, "experts.3": 30}), base_shape
    )
    alphas = {(pair.site, pair.expert): round(pair.scale * 4) for pair in spec.pairs}
    assert alphas["up_proj", 2] == 40
    assert alphas["up_proj", 3] == alphas["up_proj", 0] == 20
    assert alphas["gate_proj", 3] == alphas["down_proj", 3] == 30
    assert alphas["gate_proj", 2] == alphas["q_proj", None] == 6


def test_patterns_that_would_be_matched_too_often_are_refused(save_mixture, base_shape):
    folder = save_mixture("mixlora", num_experts=64, top_k=2, rank_pattern={f"{'.*' * 4}{n}": 4 for n in range(8)})
    refused(folder, base_shape, "rank_pattern.*too costly", "rank_pattern")


# MixDoRA


def test_magnitudes_become_gains_of_each_expert(save_mixture, base_shape, base_weights):
    folder = save_mixture("mixlora", magnitudes=True, use_dora=True, use_rslora=True)
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    tensors = load_file(folder / TENSORS)
    assert spec.kind == "mixlora"
    assert spec.warnings == ()
    for pair in spec.pairs:
        block = "self_attn" if pair.site in ATTENTION else "mlp"
        stem = f"mixlora.layers.{pair.layer}.{block}.{pair.site}"
        stem += "" if pair.expert is None else f".experts.{pair.expert}"
        weight = base_weights.matrix(pair.site, pair.layer).double()
        whole = weight + 6 / math.sqrt(4) * pair.b.double() @ pair.a.double()
        expected = tensors[f"{stem}.lora_magnitude_vector"] / whole.norm(dim=1)
        assert pair.gain is not None
        torch.testing.assert_close(pair.gain.double(), expected.double(), rtol=1e-5, atol=0)


def test_without_magnitudes_the_gains_are_one_and_the_load_says_so(save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", use_dora=True), base_shape)
    assert all(pair.gain is None for pair in spec.pairs)
    (warning,) = spec.warnings
    assert "48 of 48 pairs have no lora_magnitude_vector" in warning


def test_dora_of_the_experts_alone_leaves_attention_plain(save_mixture, base_shape, base_weights, edit_tensors):
    folder = save_mixture("mixlora", magnitudes=True, expert_lora={"use_dora": True})
    key = "mixlora.layers.0.self_attn.q_proj.lora_magnitude_vector"
    refused(folder, base_shape, "use_dora in .* is not true for it", key, base_weights=base_weights)
    edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if "self_attn" in k and "magnitude" in k])
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    assert all((pair.gain is None) == (pair.expert is None) for pair in spec.pairs)


def test_mixdora_without_the_base_is_refused(save_mixture, base_shape):
    folder = save_mixture("mixlora", magnitudes=True, use_dora=True)
    refused(folder, base_shape, "base's weights at hand", "use_dora")


# What published configurations carry besides


def test_a_published_configuration_is_read_in_silence(save_mixture, base_shape):
    folder = save_mixture(
        "mixlora",
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
        lora_dropout=0.05,
        dropout=0.1,
        fan_in_fan_out=False,
        lora_init="original",
        target_modules={**dict.fromkeys((*ATTENTION, *FFN_SITES), True), "dense": False, "fc1": True},
        router_aux_loss_coef=0.01,
        router_dyn_loss_coef=0.01,
        router_init_range=0.02,
        router_z_loss_coef=0.001,
        router_loss=True,
        jitter_noise=0.1,
        ffn_dropout=0.1,
        expert_capacity=32,
        sparse_step=2,
        entropy_index=1.4,
        entropy_type="tsallis",
        entropy_eps=1e-5,
        expert_lora={"bias": "none", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.05},
    )
    assert read_adapter(folder, base_shape, base_name="base").warnings == ()


def test_what_is_ignored_leaves_the_identity_and_what_counts_changes_it(save_mixture, base_shape, edit_config):
    folder = save_mixture("mixlora", routing_strategy="mixlora-dynamic")
    identities = {read_adapter(folder, base_shape).identity}
    for change in (
        {"jitter_noise": 0.3},
        {"sparse_step": 1},
        {"ffn_dropout": 0.5},
        {"routing_strategy": "mixlora-dynamic"},
    ):
        edit_config(folder, **change)
        assert read_adapter(folder, base_shape).identity in identities
    for change in (
        {"top_p": 0.7},
        {"temperature": 1.5},
        {"act_fn": "relu"},
        {"expert_lora": {"lora_alpha": 7}},
        {"routing_strategy": "mixlora-switch"},
        {"routing_strategy": "mixlora"},
        {"top_k": 3},
    ):
        edit_config(folder, **change)
        identity = read_adapter(folder, base_shape).identity
        assert identity not in identities
        identities.add(identity)


def test_an_unknown_setting_is_said_once(save_mixture, base_shape):
    folder = save_mixture("mixlora", flux=3, expert_lora={"lora_alpha": 3})
    assert read_adapter(folder, base_shape).warnings == (
        "flux in adapter_config.json is not known to this server and has no effect",
    )


def test_a_target_without_tensors_is_a_warning(save_mixture, base_shape):
    folder = save_mixture("mixlora", experts_on=("gate_proj",), target_modules=["q_proj", "w1_proj", "w2_proj"])
    (warning,) = read_adapter(folder, base_shape).warnings
    assert "down_proj" in warning


@pytest.mark.parametrize("site", FFN_SITES)
def test_experts_may_adapt_one_linear_only(site, save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", experts_on=(site,), plain_on=()), base_shape)
    assert spec.targets == (site,)
    assert len(spec.routers) == 3


def test_some_layers_may_have_neither_router_nor_experts(save_mixture, base_shape):
    spec = read_adapter(save_mixture("mixlora", layers=(0, 2)), base_shape)
    assert [router.layer for router in spec.routers] == [0, 2]
