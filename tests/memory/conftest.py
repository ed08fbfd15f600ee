"""Tiny bases, adapter folders that PEFT itself saves, and mixtures written out from what the formats say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.memory.adapter_spec import BaseShape

LAYERS, HIDDEN, FFN, KV, VOCAB = 3, 32, 48, 16, 64

SavePeft = Callable[..., tuple[Path, Any]]
SaveMixture = Callable[..., Path]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_SITES = ("gate_proj", "up_proj", "down_proj")
OLDEST = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}


@pytest.fixture
def base_shape() -> BaseShape:
    return BaseShape(
        num_layers=LAYERS,
        sites={
            "q_proj": (HIDDEN, HIDDEN),
            "k_proj": (HIDDEN, KV),
            "v_proj": (HIDDEN, KV),
            "o_proj": (HIDDEN, HIDDEN),
            "gate_proj": (HIDDEN, FFN),
            "up_proj": (HIDDEN, FFN),
            "down_proj": (FFN, HIDDEN),
        },
        model_sites={"lm_head": (HIDDEN, VOCAB), "embed_tokens": (VOCAB, HIDDEN)},
    )


@pytest.fixture
def make_base() -> Callable[..., Any]:
    def make(*, tied: bool = False) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def save_peft(tmp_path: Path, make_base: Callable[..., Any]) -> SavePeft:
    """Saves an adapter with random weights as PEFT does; returns its folder and the PEFT model."""

    def save(
        *, name: str = "adapter", tied: bool = False, save_options: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[Path, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options})
            model = peft.get_peft_model(make_base(tied=tied), config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key and "base_layer" not in key:
                        parameter.copy_(torch.randn(parameter.shape))
            model.save_pretrained(tmp_path / name, **(save_options or {}))
        return tmp_path / name, model

    return save


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes keys of a folder's configuration."""

    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """Rewrites a folder's tensors with a function of the dictionary."""

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


@pytest.fixture
def folder(save_peft: SavePeft) -> Path:
    """An adapter of rank 4 on every q_proj."""
    return save_peft()[0]


@dataclass
class ModelWeights:
    """A transformers model's own weights, as a server would offer them to readers."""

    model: Any

    def matrix(self, site: str, layer: int | None = None) -> torch.Tensor:
        if layer is not None:
            block = "self_attn" if site in ATTENTION else "mlp"
            module = self.model.model.layers[layer].get_submodule(f"{block}.{site}")
        else:
            module = self.model.lm_head if site == "lm_head" else self.model.model.embed_tokens
        return getattr(module, "base_layer", module).weight.detach()

    def first_inputs(self, start: int, stop: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model.model.layers[0].input_layernorm(self.matrix("embed_tokens")[start:stop])


@pytest.fixture
def weights_of() -> Callable[[Any], ModelWeights]:
    return ModelWeights


@pytest.fixture
def base_weights(make_base: Callable[..., Any]) -> ModelWeights:
    return ModelWeights(make_base())


def _features(site: str) -> tuple[int, int]:
    wide = {"k_proj": (HIDDEN, KV), "v_proj": (HIDDEN, KV), "down_proj": (FFN, HIDDEN)}
    return wide.get(site, (HIDDEN, FFN if site in FFN_SITES else HIDDEN))


def _stem(family: str, naming: str, layer: int, site: str, expert: int | None) -> str:
    """A pair's key before ``.lora_A.weight``, as each family and generation writes it."""
    start = f"{family}.layers.{layer}"
    if expert is None:
        return f"{start}.{'self_attn' if site in ATTENTION else 'mlp'}.{site}"
    if naming == "oldest":
        return f"{start}.experts.{expert}.{OLDEST[site]}"
    if naming == "package":
        return f"{start}.experts.{expert}.{site}"
    if naming == "alias":
        return f"{start}.mlp.experts.{expert}.{site}"
    return f"{start}.{'self_attn' if site in ATTENTION else 'mlp'}.{site}.experts.{expert}"


def _router_key(family: str, naming: str, layer: int, site: str) -> str:
    if family == "mixlora":
        return f"mixlora.layers.{layer}.{'gate' if naming in ('oldest', 'package') else 'mlp.moe_gate'}.weight"
    return f"{family}.layers.{layer}.{'self_attn' if site in ATTENTION else 'mlp'}.{site}.moe_gate.weight"


DEFAULTS: dict[str, dict[str, Any]] = {
    "mixlora": {"experts_on": FFN_SITES, "plain_on": ATTENTION, "routing_strategy": "mixlora", "top_k": 2},
    "mola": {"experts_on": ("q_proj", "down_proj"), "plain_on": (), "top_k": 2},
    "loramoe": {"experts_on": FFN_SITES, "plain_on": ATTENTION},
    "meteora": {"experts_on": ("q_proj", "v_proj", "up_proj"), "plain_on": (), "top_k": 2},
    "tokenwise": {"experts_on": (*ATTENTION, *FFN_SITES), "plain_on": (), "top_k": 2},
}


@pytest.fixture
def save_mixture(tmp_path: Path) -> SaveMixture:
    """Saves a mixture with random weights: of a family, in one of its namings, with any keys of the configuration."""

    def save(
        family: str,
        *,
        name: str = "mixture",
        naming: str = "modern",
        experts_on: Sequence[str] | None = None,
        plain_on: Sequence[str] | None = None,
        magnitudes: bool = False,
        num_experts: int = 4,
        expert_rank: int | None = None,
        layers: Sequence[int] = range(LAYERS),
        **config: Any,
    ) -> Path:
        generator = torch.Generator().manual_seed(1)
        options = {"peft_type": family.upper(), "r": 4, "lora_alpha": 6, **DEFAULTS[family], **config}
        default_experts, default_plain = options.pop("experts_on"), options.pop("plain_on")
        experts_on = default_experts if experts_on is None else experts_on
        plain_on = default_plain if plain_on is None else plain_on
        tensors: dict[str, torch.Tensor] = {}

        def add(layer: int, site: str, expert: int | None, rank: int) -> None:
            stem, (fan_in, fan_out) = _stem(family, naming, layer, site, expert), _features(site)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(fan_out, rank, generator=generator)
            if magnitudes:
                tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(fan_out, generator=generator) + 0.5

        for layer in layers:
            for site in plain_on:
                add(layer, site, None, options["r"])
            for site in experts_on:
                for expert in range(num_experts):
                    add(layer, site, expert, expert_rank or options["r"])
                if family != "tokenwise":
                    key = _router_key(family, naming, layer, site)
                    width = HIDDEN if family == "mixlora" else _features(site)[0]
                    tensors.setdefault(key, torch.randn(num_experts, width, generator=generator))
        if family == "tokenwise":
            tensors["tokenwise.router.weight"] = torch.randn(num_experts, HIDDEN, generator=generator)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        kept = {key: value for key, value in {"num_experts": num_experts, **options}.items() if value is not None}
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        return folder

    return save
