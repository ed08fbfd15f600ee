"""Token-wise routing: its files, and the table that replaces its router."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import Routing
from loraplex.memory.token_routes import token_routes

TENSORS, ROUTER = "adapter_model.safetensors", "tokenwise.router.weight"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def refused(folder: Path, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert key in caught.value.message


def choose(weight: torch.Tensor, x: torch.Tensor, k: int) -> list[tuple[int, float]]:
    """Experts and weights for one token, by hand: softmax, the k best, divided by their sum."""
    logits = [math.fsum((w.double() * x.double()).tolist()) for w in weight]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    best = sorted(range(len(logits)), key=lambda expert: (-exponentials[expert], expert))[:k]
    total = sum(exponentials[expert] for expert in best)
    return [(expert, exponentials[expert] / total) for expert in best]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_table_holds_for_every_token_what_its_router_would_choose(top_k, save_mixture, base_shape, base_weights):
    folder = save_mixture("tokenwise", top_k=top_k)
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    router = load_file(folder / TENSORS)[ROUTER]
    table = spec.token_routes
    assert table is not None
    assert (table.experts.dtype, table.weights.dtype) == (torch.int16, torch.float32)
    assert table.experts.shape == table.weights.shape == (64, top_k)
    inputs = base_weights.first_inputs(0, 64)
    for token in range(64):
        experts, weights = zip(*choose(router, inputs[token], top_k), strict=True)
        assert table.experts[token].tolist() == list(experts)
        torch.testing.assert_close(table.weights[token], torch.tensor(weights), rtol=1e-5, atol=1e-6)
    assert len(set(map(tuple, table.experts.tolist()))) > 1


def test_the_adapter_is_described_without_routers(save_mixture, base_shape, base_weights):
    folder = save_mixture("tokenwise", num_experts=3)
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    assert (spec.kind, spec.routers, spec.warnings) == ("tokenwise", (), ())
    assert spec.routing == Routing("token", 3, 2, renormalize=True)
    assert len(spec.pairs) == 3 * 7 * 3
    assert {pair.expert for pair in spec.pairs} == {0, 1, 2}
    tensors = load_file(folder / TENSORS)
    for pair in spec.pairs:
        block = "self_attn" if pair.site in LINEARS[:4] else "mlp"
        key = f"tokenwise.layers.{pair.layer}.{block}.{pair.site}.experts.{pair.expert}.lora_B.weight"
        assert torch.equal(pair.b, tensors[key])
    summary = describe_adapter(folder)
    assert (summary.kind, summary.rank, summary.targets) == ("tokenwise", 4, LINEARS)
    assert (summary.num_experts, summary.routing, summary.top_k, summary.scope) == (3, "top-k", 2, "token")
    assert identity_of(folder) == spec.identity


class Inputs:
    """A base of which only the first layer's inputs are known."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def first_inputs(self, start: int, stop: int) -> torch.Tensor:
        return self.inputs[start:stop]


def test_ties_go_to_the_lowest_index():
    routing = Routing("token", 5, 3, renormalize=True)
    base: Any = Inputs(torch.tensor([[1.0], [-1.0], [0.0]]))
    table = token_routes(torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]]), routing, base, 3)
    assert table.experts.tolist() == [[1, 2, 4], [0, 3, 1], [0, 1, 2]]
    torch.testing.assert_close(table.weights[0], torch.full((3,), 1 / 3))


def test_a_large_vocabulary_is_worked_through_in_blocks():
    generator = torch.Generator().manual_seed(0)
    inputs, router = torch.randn(2500, 8, generator=generator), torch.randn(6, 8, generator=generator)
    base: Any = Inputs(inputs)
    table = token_routes(router, Routing("token", 6, 2, renormalize=True), base, 2500)
    for token in (0, 1023, 1024, 2047, 2048, 2499):
        assert table.experts[token].tolist() == [expert for expert, _ in choose(router, inputs[token], 2)]


def test_routes_are_those_of_a_base_in_half_precision_where_it_is_served_so():
    inputs = torch.randn(200, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    router = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    base: Any = Inputs(inputs)
    table = token_routes(router, Routing("token", 4, 2, renormalize=True), base, 200)
    assert table.experts[7].tolist() == [expert for expert, _ in choose(router, inputs[7].float(), 2)]


# Refusals


def test_it_is_refused_without_the_base(save_mixture, base_shape):
    refused(save_mixture("tokenwise"), base_shape, "base's weights at hand", "peft_type")


def test_a_table_that_would_take_too_much_memory_is_refused():
    base: Any = Inputs(torch.ones(1, 8))
    with pytest.raises(AdapterFileError, match=r"top_k.*at most 7") as caught:
        token_routes(torch.ones(64, 8), Routing("token", 64, 8, renormalize=True), base, 1_500_000)
    assert caught.value.key == "top_k"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("top_k", 0, "integer from 1 to 4"),
        ("top_k", 5, "integer from 1 to 4"),
        ("num_experts", 40_000, "integer from 1 to 256"),
        ("routing_strategy", "mixlora", "expected tokenwise"),
        ("use_dora", True, "DoRA in this kind of mixture"),
    ],
)
def test_a_wrong_configuration_is_refused_by_key(
    key, value, match, save_mixture, base_shape, base_weights, edit_config
):
    folder = save_mixture("tokenwise")
    edit_config(folder, **{key: value})
    refused(folder, base_shape, match, key, base_weights=base_weights)


EXPERT = "tokenwise.layers.1.mlp.up_proj.experts.2"


@pytest.mark.parametrize(
    ("change", "key", "match"),
    [
        (lambda t: t.pop(ROUTER), ROUTER, "needs this router"),
        (lambda t: t.update({ROUTER: torch.ones(4, 31)}), ROUTER, r"\[4, 31\], expected \[4, 32\]"),
        (lambda t: t.update({ROUTER: torch.ones(5, 32)}), ROUTER, r"\[5, 32\], expected \[4, 32\]"),
        (lambda t: t.update({ROUTER: torch.full((4, 32), torch.nan)}), ROUTER, "NaN"),
        (lambda t: t.pop(f"{EXPERT}.lora_A.weight"), f"{EXPERT}.lora_A.weight", "both of its halves"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith(EXPERT)],
            f"{EXPERT}.lora_A.weight",
            "needs all of 0 to 3",
        ),
        (
            lambda t: t.update({"tokenwise.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
            "tokenwise.layers.0.self_attn.q_proj.lora_A.weight",
            "unknown tensor; expected tokenwise.router.weight",
        ),
        (
            lambda t: t.update({"tokenwise.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(4, 32)}),
            "tokenwise.layers.0.mlp.up_proj.moe_gate.weight",
            "unknown tensor",
        ),
        (lambda t: [t.pop(key) for key in list(t) if key != ROUTER], TENSORS, "holds no experts"),
    ],
)
def test_broken_tensors_are_refused_by_key(change, key, match, save_mixture, base_shape, base_weights, edit_tensors):
    folder = save_mixture("tokenwise")
    edit_tensors(folder, change)
    refused(folder, base_shape, match, key, base_weights=base_weights)
