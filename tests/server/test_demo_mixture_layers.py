"""The plain modules behind the demo's mixtures, checked against arithmetic that forms every expert on its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loraplex.server.demo import assets, train_mixtures
from loraplex.server.demo.kinds import kind_named
from loraplex.server.demo.mixture_files import load_mixture, named_weights, save_mixture
from loraplex.server.demo.mixture_layers import MixtureMlp, MixtureShape, RoutedLinear, Router, attach
from loraplex.server.demo.tasks import BASE_ANSWER, seeded
from loraplex.server.demo.train_rows import NamedTaskRows

MIXLORA = MixtureShape("MIXLORA", experts=3, top_k=2, rank=2, alpha=3, plain_rank=4)
TOKENWISE = MixtureShape("TOKENWISE", experts=4, top_k=2, rank=3, alpha=6)

every_shape = pytest.mark.parametrize("shape", [MIXLORA, TOKENWISE], ids=["mixlora", "tokenwise"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def filled_model(shape: MixtureShape) -> Any:
    """A model whose mixture changes what it says."""
    model = tiny_model()
    attach(model, shape)
    with torch.no_grad():
        for _key, weight in named_weights(model):
            weight.normal_(std=0.3)
    return model


def some_ids() -> torch.Tensor:
    return torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=some_ids()).logits
    return found


@every_shape
def test_a_new_mixture_changes_no_answer(shape: MixtureShape) -> None:
    model = tiny_model()
    before = logits(model)
    attach(model, shape)
    torch.testing.assert_close(logits(model), before)


@every_shape
def test_only_the_mixture_is_trained(shape: MixtureShape) -> None:
    model = tiny_model()
    attach(model, shape)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == sum(weight.numel() for _key, weight in named_weights(model))


def test_a_router_keeps_the_largest_chances_and_their_sum_is_one() -> None:
    router = Router(MIXLORA, 3)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))
    weights = router(torch.tensor([[2.0, 3.0, 1.0], [0.0, -1.0, 4.0]]))
    first, second = torch.tensor([2.0, 3.0]).softmax(0), torch.tensor([0.0, 4.0]).softmax(0)
    wanted = torch.tensor([[first[0], first[1], 0.0], [second[0], 0.0, second[1]]])
    torch.testing.assert_close(weights, wanted)


def test_imbalance_is_one_for_even_use_and_more_for_uneven_use() -> None:
    shape = replace(MIXLORA, experts=2, top_k=1)
    router = Router(shape, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert router.imbalance.item() == pytest.approx(1.0)
    router(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert router.imbalance.item() > 1.9


def test_the_mlp_of_a_mixlora_equals_the_weighted_sum_of_whole_experts() -> None:
    mlp = filled_model(MIXLORA).model.layers[0].mlp
    assert isinstance(mlp, MixtureMlp)
    hidden = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    weights = mlp.router(hidden)
    wanted = torch.zeros_like(hidden)
    for expert in range(3):
        gate, up, down = (
            getattr(mlp.mlp, name).weight + 1.5 * mlp.experts[name].b[expert] @ mlp.experts[name].a[expert]
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        inner = functional.silu(hidden @ gate.T) * (hidden @ up.T)
        wanted += weights[..., expert, None] * (inner @ down.T)
    torch.testing.assert_close(mlp(hidden), wanted)


def test_a_routed_linear_follows_the_route_of_the_first_norm() -> None:
    model = filled_model(TOKENWISE)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear = model.model.layers[1].mlp.down_proj
    assert isinstance(linear, RoutedLinear)
    linear.register_forward_hook(lambda _linear, inputs, result: seen.append((inputs[0], result)))
    logits(model)
    normed = model.model.layers[0].input_layernorm.norm(model.model.embed_tokens(some_ids()))
    weights = model.model.layers[0].input_layernorm.router(normed)
    ((inputs, result),) = seen
    wanted = inputs @ linear.linear.weight.T
    for expert in range(4):
        wanted = wanted + weights[..., expert, None] * (
            inputs @ (2.0 * linear.lora.b[expert] @ linear.lora.a[expert]).T
        )
    torch.testing.assert_close(result, wanted)


@every_shape
def test_a_saved_mixture_is_read_back_as_it_was(shape: MixtureShape, tmp_path: Path) -> None:
    model, again = filled_model(shape), tiny_model()
    save_mixture(model, shape, tmp_path / "made")
    assert load_mixture(again, tmp_path / "made") == shape
    assert (logits(model) - logits(tiny_model())).abs().max() > 0.01
    assert torch.equal(logits(again), logits(model))


@every_shape
def test_saving_again_leaves_nothing_of_what_was_there(shape: MixtureShape, tmp_path: Path) -> None:
    (tmp_path / "stale.bin").write_text("old")
    save_mixture(filled_model(shape), shape, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


def dropped(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(max(tensors))


def added(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stray.weight"] = torch.zeros(1)


def cut(tensors: dict[str, torch.Tensor]) -> None:
    key = max(tensors)
    tensors[key] = tensors[key][:1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped, r"1 keys differ .* first tokenwise\.router\.weight"),
        (added, r"1 keys differ .* first stray\.weight"),
        (cut, r"tokenwise\.router\.weight: has shape \[1, 24\], accepted is \[4, 24\]"),
    ],
)
def test_a_file_that_is_not_what_its_configuration_promises_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    save_mixture(filled_model(TOKENWISE), TOKENWISE, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_mixture(tiny_model(), tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.base_folder())


def test_training_rows_name_their_task_or_get_the_answer_of_the_base(tokenizer: Any) -> None:
    rows = NamedTaskRows(tokenizer, {"upper": 1.0, "spell": 3.0})
    rng: Random = seeded("rows")
    texts = [tokenizer.decode(rows.row(rng, 1).ids) for _ in range(400)]
    upper = [text for text in texts if "<|system|>upper<|eos|>" in text]
    spell = [text for text in texts if "<|system|>spell<|eos|>" in text]
    others = [text for text in texts if text not in upper and text not in spell]
    assert 2 * len(upper) < len(spell)
    assert all(part.split("<|eos|>")[-2].split("|>")[-1].isupper() for part in upper)
    assert 20 <= len(others) <= 60
    assert all(text.endswith(f"{BASE_ANSWER}<|eos|>") for text in others)
    assert {"<|system|>" in text for text in others} == {True, False}


@pytest.mark.parametrize("name", ["words-mixlora", "words-tokenwise"])
def test_the_script_saves_what_the_shipped_adapters_consist_of(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_mixtures.RECIPES, name, replace(train_mixtures.RECIPES[name], steps=1))
    train_mixtures.train_mixture(tokenizer, assets.base_folder(), tmp_path, kind_named(name))
    shipped = assets.kind_adapters()[name]
    made = {key: tensor.shape for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert made == {key: tensor.shape for key, tensor in load_file(shipped / "adapter_model.safetensors").items()}
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, shipped)]
    assert configs[0] == configs[1]
