"""Trains the demo's adapters: one PEFT LoRA per task on the frozen base, no two of them shaped alike.

An adapter sees only the plain chat format. It learns to make of ``<|assistant|>`` what the base makes of the task's
control token, which is why a low rank and a hundred steps are enough.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loraplex.server.demo.kinds import BASE_NAME
from loraplex.server.demo.tasks import Task, seeded
from loraplex.server.demo.train_base import accumulate, draw_rows
from loraplex.server.demo.train_rows import RowMaker

_SEED = 7
_RATE = 1.2e-2
_WARM_UP = 10
_TOKENS_PER_STEP = 800
_MOST_TURNS = 4
_SYSTEM_SHARE = 0.2

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """Rank, alpha, targets and training steps of one adapter; ``more`` goes to ``LoraConfig`` as it is."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    steps: int = 60


# Between them the adapters hold what an engine must handle: ranks from 1 to 16, every kind of target, ranks that
# differ inside one adapter, both rules of scaling, an adapter of the first layers alone, and one of the output head.
SHAPES: dict[str, Shape] = {
    "upper": Shape(2, 4, ("q_proj", "v_proj")),
    "reverse": Shape(8, 16, _ATTENTION, steps=150),
    "sort": Shape(16, 32, _ATTENTION + _MLP, steps=480),
    "caesar": Shape(4, 8, _MLP),
    "echo": Shape(8, 6, ("q_proj", "v_proj", "o_proj"), {"use_rslora": True}),
    "spell": Shape(1, 2, _ATTENTION + _MLP),
    "devowel": Shape(4, 8, ("v_proj", "o_proj", "down_proj"), {"layers_to_transform": [0, 1, 2]}, steps=240),
    "count": Shape(4, 8, ("q_proj", "v_proj", "down_proj"), {"rank_pattern": {"down_proj": 2, "q_proj": 6}}),
    "add": Shape(12, 24, _ATTENTION + _MLP, {"alpha_pattern": {"v_proj": 12}}, steps=300),
    "emoji": Shape(4, 8, ("q_proj", "v_proj", "lm_head")),
}

# The adapters with magnitudes, by their own names: each does a task that a plain adapter does too.
DORA_SHAPES: dict[str, Shape] = {
    "reverse-dora": Shape(4, 8, _ATTENTION + _MLP, {"use_dora": True}, steps=150),
}


def train_adapter(tokenizer: PreTrainedTokenizerFast, base: Path, out: Path, task: Task, shape: Shape) -> None:
    """Train an adapter of one task on the saved base and save it in its own folder."""
    torch.manual_seed(_SEED)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora_config(shape))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    rows = RowMaker(tokenizer, task, _SYSTEM_SHARE)
    for step in range(shape.steps):
        for group in optimizer.param_groups:
            # The ranks add up in the change of a weight, so that more of them want smaller steps.
            group["lr"] = _RATE * shape.rank**-0.25 * min(1.0, (step + 1) / _WARM_UP) * (1 - step / shape.steps)
        drawn = draw_rows(rows, seeded(task.name, _SEED, step), _TOKENS_PER_STEP, _MOST_TURNS)
        loss = accumulate(model, drawn, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            _log.info("%s: step %d of %d, loss %.4f", out.name, step + 1, shape.steps, loss)
    _save(model, out)


def lora_config(shape: Shape) -> LoraConfig:
    """PEFT's configuration of an adapter shape."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=0.0,
        target_modules=list(shape.targets),
        **shape.more,
    )


def _save(model: Any, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    # A copy of the embeddings would be larger than the adapter, and no adapter changes them.
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    # Tensors are written for their owner alone, which a packed copy would keep.
    (out / "adapter_model.safetensors").chmod(0o644)
    settings = out / "adapter_config.json"
    config = json.loads(settings.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    # PEFT holds the targets in a set, whose order changes from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _log.info("saved %s", out)
