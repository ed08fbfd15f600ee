"""What a step must do at least: bytes through the device's memory and floating-point operations, counted from shapes.

Each weight, each distinct adapter and each key and value is read once. Activations are left out: at decode they are far
below a thousandth of the weights, at prefill products decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ATTENTION_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_SITES = ("gate_proj", "up_proj", "down_proj")
ALL_SITES = (*ATTENTION_SITES, *FFN_SITES)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a Llama decoder without biases, whose head is not tied to its embedding."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int

    @property
    def sites(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Of all layers' linears."""
        return self.layers * sum(i * o for i, o in self.sites.values())

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    def kv_elements(self, tokens: int) -> int:
        """Keys and values of so many tokens, all layers."""
        return self.layers * tokens * 2 * self.kv_heads * self.head_dim

    def lora_parameters(self, rank: int, sites: Iterable[str] = ALL_SITES) -> int:
        """Of one adapter of this rank at these sites, all layers."""
        return self.layers * rank * sum(sum(self.sites[site]) for site in sites)

    def mixture_parameters(self, rank: int, num_experts: int, chosen: int, itemsize: int) -> int:
        """What a MixLoRA of experts of this rank reads in a step in which so many distinct experts are chosen: LoRA on
        attention, the experts, and the routers, which are float32, in elements of ``itemsize`` bytes."""
        routers = self.layers * num_experts * self.hidden * 4 // itemsize
        experts = chosen * self.lora_parameters(rank, FFN_SITES)
        return self.lora_parameters(rank, ATTENTION_SITES) + experts + routers


LLAMA_8B = ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8192)
TINY = ModelShape("tiny", 2, 128, 256, 4, 2, 32, 512, 2048)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device was seen to do at best: copies (bytes read plus bytes written) a second, floating-point
    operations a second of a large product, and bytes a second from pinned host memory."""

    copy: float
    matmul: float
    from_host: float

    def seconds(self, num_bytes: float, flops: float = 0.0) -> float:
        """The least time for so much work: the longer of the two."""
        return max(num_bytes / self.copy, flops / self.matmul)


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and floating-point operations."""

    num_bytes: float
    flops: float

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return ceilings.seconds(self.num_bytes, self.flops)


def decode_work(shape: ModelShape, batch: int, context: int, itemsize: int, adapter_elements: int = 0) -> Work:
    """One decode step of ``batch`` rows that each see ``context`` keys, with so many adapter elements read in all."""
    weights = shape.linear_parameters + shape.head_parameters
    elements = weights + batch * shape.kv_elements(context) + adapter_elements
    attention = 4 * batch * context * shape.layers * shape.heads * shape.head_dim
    return Work(elements * itemsize, 2.0 * batch * weights + attention)


def prefill_work(shape: ModelShape, rows: int, itemsize: int, adapter_elements: int = 0) -> Work:
    """One prompt of ``rows`` tokens from its start, one row of logits; all rows under one adapter, if any."""
    elements = shape.linear_parameters + shape.head_parameters + shape.kv_elements(rows) + adapter_elements
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * rows * (rows + 1) / 2
    products = 2.0 * rows * (shape.linear_parameters + adapter_elements) + 2.0 * shape.head_parameters
    return Work(elements * itemsize, products + attention)
