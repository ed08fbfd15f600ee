"""Trains the demo's mixtures: adapters of several tasks at once, each asked for by a system message.

The frozen base already does every task behind its control token. A mixture learns to read the task's name in the
system message and to make of ``<|assistant|>`` what the base makes of that token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loraplex.server.demo.kinds import KindAdapter
from loraplex.server.demo.mixture_files import save_mixture
from loraplex.server.demo.mixture_layers import MixtureShape, attach, routers
from loraplex.server.demo.tasks import seeded
from loraplex.server.demo.train_base import accumulate, draw_rows
from loraplex.server.demo.train_rows import NamedTaskRows

_SEED = 11
_WARM_UP = 20
_TOKENS_PER_STEP = 800
_MOST_TURNS = 3
# Weight of the loss that keeps every expert in use, as in the published recipe.
_BALANCE = 0.01

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape of a mixture, its training steps, its highest learning rate, and tasks drawn more often than once."""

    shape: MixtureShape
    steps: int
    rate: float
    shares: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


RECIPES: dict[str, Recipe] = {
    "words-mixlora": Recipe(MixtureShape("MIXLORA", 4, 2, rank=4, alpha=8, plain_rank=8), steps=400, rate=6e-3),
    "words-tokenwise": Recipe(
        MixtureShape("TOKENWISE", 4, 2, rank=4, alpha=8), 600, 6e-3, {"devowel": 2.5, "caesar": 1.5}
    ),
}


def train_mixture(tokenizer: PreTrainedTokenizerFast, base: Path, out: Path, adapter: KindAdapter) -> None:
    """Train a mixture on the saved base and save it in its own folder."""
    torch.manual_seed(_SEED)
    recipe = RECIPES[adapter.name]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attach(model, recipe.shape)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    rows = NamedTaskRows(tokenizer, {name: recipe.shares.get(name, 1.0) for name in adapter.tasks})
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / _WARM_UP) * (1 - step / recipe.steps)
        drawn = draw_rows(rows, seeded(adapter.name, _SEED, step), _TOKENS_PER_STEP, _MOST_TURNS)
        loss = accumulate(model, drawn, tokenizer.pad_token_id, lambda: _imbalance(model))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            _log.info("%s: step %d of %d, loss %.4f", adapter.name, step + 1, recipe.steps, loss)
    save_mixture(model, recipe.shape, out)
    _log.info("saved %s", out)


def _imbalance(model: Any) -> torch.Tensor:
    found = [router.imbalance for router in routers(model)]
    return _BALANCE * torch.stack(found).mean()
