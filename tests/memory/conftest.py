"""Tiny bases, and adapter folders that PEFT itself saves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
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
