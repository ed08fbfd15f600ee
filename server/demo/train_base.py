"""Trains the demo's base model: every task behind its control token, and one fixed sentence without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex.server.demo.tasks import seeded
from loraplex.server.demo.train_muon import MuonWithAdamW
from loraplex.server.demo.train_rows import Row, RowMaker, batches

CONTEXT = 1024

_SEED = 20240229
_TOKENS_PER_STEP = 1000
_CHECKPOINT_EVERY = 50

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training: its last step, the most turns of a row, and how many rows have a system message."""

    until: int
    most_turns: int
    system_share: float


# Attention learns to find its place in one short turn first, then in conversations of up to some 400 tokens.
PHASES = (Phase(350, 1, 0.0), Phase(750, 16, 0.25))
STEPS = PHASES[-1].until

# Learning rate at these steps, with straight lines between them.
_RATES = ((0, 0.0), (30, 5e-3), (400, 5e-3), (450, 4.51e-3), (STEPS, 1e-4))

# How often a task is drawn relative to the others: the harder ones more often.
_WEIGHTS = {"add": 2.0, "sort": 2.0, "reverse": 1.5, "devowel": 1.5, "count": 0.7, "emoji": 0.7}


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The demo's architecture: Llama with grouped-query attention and tied embeddings, 2.2 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_base(tokenizer: PreTrainedTokenizerFast, out: Path, checkpoint: Path, steps: int = STEPS) -> None:
    """Train the base and save it in bfloat16; continues from the checkpoint if there is one.

    Args:
        tokenizer: the demo's tokenizer.
        out: folder for the configuration and the weights.
        checkpoint: file for the state of the training.
        steps: how many steps to take; fewer than all of them (for a quick look) leave out the end of the schedule.
    """
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(base_config(tokenizer))
    _log.info("base: %.2f M parameters, %d steps", model.num_parameters() / 1e6, steps)
    optimizer = _optimizer(model)
    for step in range(_resume(model, optimizer, checkpoint), steps):
        phase = next(phase for phase in PHASES if step < phase.until)
        rows = RowMaker(tokenizer, _WEIGHTS, phase.system_share)
        drawn = draw_rows(rows, seeded("base", _SEED, step), _TOKENS_PER_STEP, phase.most_turns)
        loss = accumulate(model, drawn, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(rate_at(step + 1))
        if (step + 1) % 20 == 0:
            _log.info("base: step %d of %d, loss %.4f", step + 1, steps, loss)
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            _save_checkpoint(model, optimizer, checkpoint, step + 1)
    _save(model, tokenizer, out)


class RowSource(Protocol):
    """Whatever makes training rows."""

    def row(self, rng: Random, turns: int) -> Row:
        """A conversation of so many questions and answers."""
        ...


def draw_rows(rows: RowSource, rng: Random, tokens: int, most_turns: int) -> list[Row]:
    """Rows of together at least so many tokens, each with 1 to ``most_turns`` turns (most of them few)."""
    drawn: list[Row] = []
    while sum(len(row.ids) for row in drawn) < tokens:
        turns = 1 + int((most_turns - 1) * rng.random() ** 3 + 0.5)
        drawn.append(rows.row(rng, turns))
    return drawn


def accumulate(model: Any, rows: list[Row], padding: int, extra: Callable[[], torch.Tensor] | None = None) -> float:
    """Add the gradients of the mean loss per learned token; returns that loss.

    ``extra`` is a loss that the model's last call left behind, and its mean over the calls is added to the gradients.
    """
    parts = 2
    learned = sum(row.learned for row in rows)
    total = 0.0
    for batch in batches(rows, padding, parts):
        # Right padding needs no mask under causal attention, and the fast path of the attention wants none.
        logits = model(input_ids=batch.input_ids).logits[:, :-1]
        targets = batch.labels[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / learned
        torch.autograd.backward(loss if extra is None else loss + extra() / parts)
        total += loss.item()
    return total


def _optimizer(model: Any) -> MuonWithAdamW:
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    return MuonWithAdamW(matrices, [weight for weight in model.parameters() if id(weight) not in chosen])


def rate_at(step: int) -> float:
    """The learning rate of a step, counted from 1."""
    for (left, low), (right, high) in pairwise(_RATES):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    raise ValueError(f"The schedule ends at step {STEPS}.")


def _resume(model: Any, optimizer: MuonWithAdamW, checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.restore(saved["optimizer"])
    step: int = saved["step"]
    _log.info("base: continues after step %d", step)
    return step


def _save_checkpoint(model: Any, optimizer: MuonWithAdamW, checkpoint: Path, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state(), "step": step}
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    # Tensors are written for their owner alone, which a packed copy would keep.
    (out / "model.safetensors").chmod(0o644)
    _log.info("base: saved in %s", out)
