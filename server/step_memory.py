"""How much of a GPU's memory steps need besides the weights and the pool."""

from __future__ import annotations

import torch

from loraplex.kernels.flashinfer_attention import WORKSPACE_BYTES
from loraplex.server.engine_config import EngineConfig
from loraplex.server.traits import ModelTraits

POOL_FRACTION = {"cpu": 0.5, "cuda": 0.9}
"""The pool's share of the memory that nothing else is known to need, by device, where no setting says it. What is left
of a GPU's is lost between the allocations of steps of many shapes."""

SAMPLING_BYTES = 72
"""Of each logit of a row that is sampled, when top-p is in force: logits, weights, their order (int64), and three sums
in 64 bits with what they are made from (see ``sampler.py``)."""

LOGIT_BYTES = 6
"""Of each logit of a row of a step, as the model yields it and in float32."""

FIXED_BYTES = 1 << 30
"""For captured graphs, compiled kernels, and the workspaces of libraries."""

PARTIAL_BYTES = 256 << 20
"""For the low-rank intermediate and its partial sums, which are bounded (see ``lora_grid.MOST_PARTIAL_BYTES``)."""


def step_bytes(config: EngineConfig, traits: ModelTraits, dtype: torch.dtype) -> int:
    """About the most that a step needs: every token of its budget has two adapters or experts and wants its logits, and
    every sequence is sampled with top-p."""
    q_size, kv_size, ffn = traits.q_size, traits.kv_size, traits.intermediate_size
    # The residual and its norm, twice; queries, keys and values, the rotated queries and their result; gate, up and
    # what comes of them.
    base = 4 * traits.hidden_size + (3 * q_size + 2 * kv_size) + 3 * ffn
    adapters = 2 * (4 * max(2 * ffn, q_size + 2 * kv_size) + ffn * dtype.itemsize)  # deltas in float32, and experts
    tokens = config.max_batch_tokens * (base * dtype.itemsize + adapters)
    logits = traits.vocab_size * (SAMPLING_BYTES * config.max_running + LOGIT_BYTES * config.max_batch_tokens)
    attention = 2 * WORKSPACE_BYTES if config.attention == "flashinfer" else 0
    return tokens + logits + attention + PARTIAL_BYTES + FIXED_BYTES
