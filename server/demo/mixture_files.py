"""Writes the demo's mixtures in their published formats, and reads the files back into plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loraplex.server.demo.kinds import BASE_NAME
from loraplex.server.demo.mixture_layers import (
    ATTENTION,
    MLP,
    LoraLinear,
    LowRank,
    MixtureMlp,
    MixtureShape,
    RoutedLinear,
    RoutingNorm,
    attach,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


def save_mixture(model: Any, shape: MixtureShape, out: Path) -> None:
    """Write the mixture on a model as an adapter folder; what the folder held before is gone."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    tensors = {key: weight.detach().float().contiguous() for key, weight in named_weights(model)}
    save_file(tensors, out / TENSOR_FILE, metadata={"format": "pt"})
    # Tensors are written for their owner alone, which a packed copy would keep.
    (out / TENSOR_FILE).chmod(0o644)
    (out / CONFIG_FILE).write_text(json.dumps(_config(shape), indent=2, sort_keys=True) + "\n")


def load_mixture(model: Any, folder: Path) -> MixtureShape:
    """Put a saved mixture on a bare Transformers Llama, in place.

    Raises:
        ValueError: the tensors of the file are not those that its configuration promises.
    """
    shape = _shape(json.loads((folder / CONFIG_FILE).read_text()))
    tensors = load_file(folder / TENSOR_FILE)
    attach(model, shape)
    wanted = dict(named_weights(model))
    if tensors.keys() != wanted.keys():
        differ = sorted(tensors.keys() ^ wanted.keys())
        raise ValueError(
            f"{TENSOR_FILE}: {len(differ)} keys differ from what {CONFIG_FILE} promises, first {differ[0]}."
        )
    with torch.no_grad():
        for key, weight in wanted.items():
            if tensors[key].shape != weight.shape:
                raise ValueError(f"{key}: has shape {list(tensors[key].shape)}, accepted is {list(weight.shape)}.")
            weight.copy_(tensors[key])
    return shape


def named_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of every weight of the mixture on a model, under their published names."""
    norm = model.model.layers[0].input_layernorm
    if isinstance(norm, RoutingNorm):
        yield "tokenwise.router.weight", norm.router.weight
    for at, layer in enumerate(model.model.layers):
        if isinstance(norm, RoutingNorm):
            yield from _tokenwise_layer(f"tokenwise.layers.{at}", layer)
        else:
            yield from _mixlora_layer(f"mixlora.layers.{at}", layer)


def _tokenwise_layer(prefix: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
        for name in names:
            linear = getattr(getattr(layer, part), name)
            assert isinstance(linear, RoutedLinear)
            yield from _experts(f"{prefix}.{part}.{name}", linear.lora)


def _mixlora_layer(prefix: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    mlp: nn.Module = layer.mlp
    assert isinstance(mlp, MixtureMlp)
    yield f"{prefix}.mlp.moe_gate.weight", mlp.router.weight
    for name in MLP:
        low = mlp.experts[name]
        assert isinstance(low, LowRank)
        yield from _experts(f"{prefix}.mlp.{name}", low)
    for name in ATTENTION:
        linear = getattr(layer.self_attn, name)
        assert isinstance(linear, LoraLinear)
        yield f"{prefix}.self_attn.{name}.lora_A.weight", linear.lora.a[0]
        yield f"{prefix}.self_attn.{name}.lora_B.weight", linear.lora.b[0]


def _experts(prefix: str, low: LowRank) -> Iterator[tuple[str, torch.Tensor]]:
    for expert in range(low.a.size(0)):
        yield f"{prefix}.experts.{expert}.lora_A.weight", low.a[expert]
        yield f"{prefix}.experts.{expert}.lora_B.weight", low.b[expert]


def _config(shape: MixtureShape) -> dict[str, Any]:
    config = {
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "lora_dropout": 0.0,
        "num_experts": shape.experts,
        "peft_type": shape.kind,
        "target_modules": dict.fromkeys(sorted(ATTENTION + MLP), True),
        "task_type": "CAUSAL_LM",
        "top_k": shape.top_k,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
    }
    if shape.kind == "MIXLORA":
        alpha = shape.scale * shape.plain_rank
        assert alpha.is_integer()
        experts = {"r": shape.rank, "lora_alpha": shape.alpha}
        config |= {"r": shape.plain_rank, "lora_alpha": int(alpha), "expert_lora": experts}
        config |= {"routing_strategy": "mixlora", "act_fn": "silu"}
    return config


def _shape(config: dict[str, Any]) -> MixtureShape:
    kind = config["peft_type"]
    experts = config.get("expert_lora", config)
    return MixtureShape(
        kind=kind,
        experts=config["num_experts"],
        top_k=config["top_k"],
        rank=experts["r"],
        alpha=experts["lora_alpha"],
        plain_rank=config["r"] if kind == "MIXLORA" else 0,
    )
