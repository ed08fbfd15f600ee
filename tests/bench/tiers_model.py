"""Bases with random weights and folders of adapters for them, as many as are asked for, written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.memory.adapter_image import CHUNK, chunks_of
from loraplex.memory.arena import PageShape, page_shape

_STRIDE = 61
"""Elements by which the weights of one adapter are shifted against those of the one before it."""


@dataclass(frozen=True, slots=True)
class BaseSizes:
    """A Llama base. Heads have ``hidden / heads`` dimensions."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_size(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """In and out features of the linears of a layer."""
        hidden, kv, ffn = self.hidden, self.kv_size, self.ffn
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, ffn),
            "mlp.up_proj": (hidden, ffn),
            "mlp.down_proj": (ffn, hidden),
        }

    def page_shape(self) -> PageShape:
        """Pages of the engine's default size, in float32."""
        return page_shape(self.layers, self.kv_size, 16, torch.float32)

    def adapter_pages(self, rank: int) -> int:
        """Pages that an adapter over all linears takes."""
        elements = rank * CHUNK * sum(chunks_of(width) for pair in self.linears.values() for width in pair)
        return -(-elements // self.page_shape().page_elems)

    def adapter_bytes(self, rank: int) -> int:
        """Bytes that its image takes."""
        return self.adapter_pages(rank) * self.page_shape().page_bytes


SIZES = {
    "0.37b": BaseSizes(896, 4864, 24, 14, 2, 8192),
    "small": BaseSizes(256, 768, 4, 4, 2, 2000),
    "tiny": BaseSizes(64, 96, 2, 2, 1, 200),
}


def write_base(root: Path, name: str) -> Path:
    """A checkpoint of one of ``SIZES``, in bfloat16."""
    folder, sizes = root / f"base-{name}", SIZES[name]
    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_adapters(root: Path, name: str, rank: int, count: int) -> Path:
    """A folder of so many PEFT LoRA folders over all linears, no two with the same weights.

    Those that are there already stay; a folder holds one count of adapters only.
    """
    folder, sizes = root / f"adapters-{name}-r{rank}-{count}", SIZES[name]
    head, num_elements = _template(sizes, rank)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(num_elements + _STRIDE * count, generator=generator) * 0.05
    stream = values.to(torch.bfloat16).view(torch.int16).numpy()
    targets = [linear.partition(".")[2] for linear in sizes.linears]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    for index in range(count):
        own = folder / f"adapter-{index:05d}"
        if not (own / "adapter_config.json").is_file():
            own.mkdir(parents=True, exist_ok=True)
            _write_tensors(own / "adapter_model.safetensors", head, stream[_STRIDE * index :][:num_elements])
            (own / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _template(sizes: BaseSizes, rank: int) -> tuple[bytes, int]:
    """What the files of all adapters begin with, and the elements behind that."""
    tensors = {}
    for layer in range(sizes.layers):
        for linear, (width, out) in sizes.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{linear}"
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(rank, width, dtype=torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(out, rank, dtype=torch.bfloat16)
    num_elements = sum(tensor.numel() for tensor in tensors.values())
    return save(tensors)[: -2 * num_elements], num_elements


def _write_tensors(path: Path, head: bytes, values: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.write(values.tobytes())
