"""Adapter folders with random weights, of every kind and under every name that they were published with.

Matrices are as large as the base's own, so that an adapter moves the logits, and routers so large that tokens differ in
their routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
OLDEST_NAMES = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}

ROUTERS = {
    "modern": "mixlora.layers.{layer}.mlp.moe_gate",
    "alias": "mixlora.layers.{layer}.mlp.moe_gate",
    "old": "mixlora.layers.{layer}.gate",
    "oldest": "mixlora.layers.{layer}.gate",
}
EXPERTS = {
    "modern": "mixlora.layers.{layer}.mlp.{site}.experts.{expert}",
    "alias": "mixlora.layers.{layer}.mlp.experts.{expert}.{site}",
    "old": "mixlora.layers.{layer}.experts.{expert}.{site}",
    "oldest": "mixlora.layers.{layer}.experts.{expert}.{site}",
}


def parent_of(site: str) -> str:
    return "self_attn" if site in ATTENTION else "mlp"


class Draw:
    """Random tensors for the linears of a transformers model, gathered under their keys."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.tensors: dict[str, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)

    def weight(self, layer: int, site: str) -> torch.Tensor:
        """[out, in]"""
        return getattr(getattr(self.model.model.layers[layer], parent_of(site)), site).weight.data

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=self._random) * std

    def pair(self, key: str, layer: int, site: str, rank: int, *, magnitude_at: float | None = None) -> None:
        """A low-rank pair; with the scale ``magnitude_at`` also magnitudes, 0.5 to 1.5 times the adapted norms."""
        weight = self.weight(layer, site)
        a, b = self.normal(rank, weight.shape[1], std=0.15), self.normal(weight.shape[0], rank, std=0.15)
        self.tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if magnitude_at is not None:
            norms = (weight + magnitude_at * b @ a).norm(dim=1)
            factors = 0.5 + torch.rand(norms.shape, generator=self._random)
            self.tensors[f"{key}.lora_magnitude_vector"] = norms * factors

    def router(self, key: str, num_experts: int, in_features: int) -> None:
        self.tensors[f"{key}.weight"] = self.normal(num_experts, in_features, std=0.3)

    def save(self, folder: Path, config: Mapping[str, Any]) -> Path:
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def scale_of(config: Mapping[str, Any]) -> float:
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def write_mixlora(
    model: Any,
    folder: Path,
    *,
    seed: int = 0,
    naming: str = "modern",
    targets: Sequence[str] = FFN,
    attention: Sequence[str] = ("q_proj", "v_proj"),
    magnitudes: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """MixLoRA; ``magnitudes`` are the sites that get DoRA's, ``layers`` those that are adapted, ``options`` go to the
    configuration. An option of None is left out of it."""
    config: dict[str, Any] = {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.05,
        "jitter_noise": 0.1,
        "router_aux_loss_coef": 0.01,
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 4,
        "top_k": 2,
        "use_dora": bool(magnitudes),
        "target_modules": [*attention, *targets],
        **options,
    }
    config = {key: value for key, value in config.items() if value is not None}
    if naming == "oldest":
        config["target_modules"] = {OLDEST_NAMES.get(site, site): True for site in config["target_modules"]}
    expert_config = config | config.get("expert_lora", {})
    draw = Draw(model, seed)

    def pair(key: str, layer: int, site: str, pair_config: Mapping[str, Any]) -> None:
        magnitude_at = scale_of(pair_config) if site in magnitudes else None
        draw.pair(key, layer, site, pair_config["r"], magnitude_at=magnitude_at)

    for layer in range(len(model.model.layers)) if layers is None else layers:
        draw.router(ROUTERS[naming].format(layer=layer), config["num_experts"], draw.weight(layer, "up_proj").shape[1])
        for site in attention:
            pair(f"mixlora.layers.{layer}.self_attn.{site}", layer, site, config)
        for site in targets:
            name = OLDEST_NAMES[site] if naming == "oldest" else site
            for expert in range(config["num_experts"]):
                pair(EXPERTS[naming].format(layer=layer, site=name, expert=expert), layer, site, expert_config)
    return draw.save(folder, config)


def write_routed_linears(
    model: Any,
    folder: Path,
    kind: str,
    *,
    seed: int = 0,
    routed: Sequence[str] = (*ATTENTION, *FFN),
    plain: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """MOLA, LORAMOE, METEORA or TOKENWISE: experts on the linears ``routed``, ordinary pairs on ``plain``."""
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 4,
        **({} if kind == "LORAMOE" else {"top_k": 2}),
        "target_modules": [*routed, *plain],
        **options,
    }
    config = {key: value for key, value in config.items() if value is not None}
    draw, prefix = Draw(model, seed), kind.lower()
    for layer in range(len(model.model.layers)) if layers is None else layers:
        for site in routed:
            key = f"{prefix}.layers.{layer}.{parent_of(site)}.{site}"
            if kind != "TOKENWISE":
                draw.router(f"{key}.moe_gate", config["num_experts"], draw.weight(layer, site).shape[1])
            for expert in range(config["num_experts"]):
                draw.pair(f"{key}.experts.{expert}", layer, site, config["r"])
        for site in plain:
            draw.pair(f"{prefix}.layers.{layer}.{parent_of(site)}.{site}", layer, site, config["r"])
    if kind == "TOKENWISE":
        draw.router("tokenwise.router", config["num_experts"], model.config.hidden_size)
    return draw.save(folder, config)


def write(model: Any, folder: Path, kind: str, **options: Any) -> Path:
    """A folder of a kind of mixture, named as ``peft_type`` names it."""
    if kind == "MIXLORA":
        return write_mixlora(model, folder, **options)
    return write_routed_linears(model, folder, kind, **options)
