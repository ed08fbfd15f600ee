"""The 0.37 B model that benchmarks run on, and adapters for it: random weights, made once, kept in ``.benchmarks``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / ".benchmarks" / "llama-0.37b"
LINEARS = {
    "self_attn.q_proj": (896, 896),
    "self_attn.k_proj": (896, 128),
    "self_attn.v_proj": (896, 128),
    "self_attn.o_proj": (896, 896),
    "mlp.gate_proj": (896, 4864),
    "mlp.up_proj": (896, 4864),
    "mlp.down_proj": (4864, 896),
}
LAYERS = 24
VOCABULARY = 8192
RANK = 16


def make_checkpoint() -> Path:
    """A bf16 Llama checkpoint: hidden 896, 24 layers, ffn 4864, 14 query and 2 K/V heads of 64, vocabulary 8192."""
    folder = FOLDER / "base"
    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_adapters(count: int, rank: int = RANK) -> list[Path]:
    """So many PEFT LoRA folders over all linears, with random weights that change the model's answers."""
    return [_make_adapter(index, rank) for index in range(count)]


def _make_adapter(index: int, rank: int) -> Path:
    folder = FOLDER / f"r{rank}" / f"adapter-{index:03d}"
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 + index)
    tensors = {}
    for layer in range(LAYERS):
        for name, (width, out) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn((rank, width), generator=generator) * width**-0.5
            b = torch.randn((out, rank), generator=generator) * 0.02
            tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.split(".")[1] for name in LINEARS]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same for all systems."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
