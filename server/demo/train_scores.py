"""Scores the trained demo on unseen inputs, with Transformers and PEFT, and writes the table of the README."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.demo.scoring import greedy_answers, raw_prompt
from loraplex.server.demo.tasks import TASKS, Task, exact_match, unseen_inputs
from loraplex.server.demo.train_adapters import SHAPES

_INPUTS = 500
_INPUTS_BFLOAT16 = 100
_WANTED = 0.95
_ALLOWED = 0.10

_log = logging.getLogger(__name__)


def write_scores(base: Path, adapters: Path, out: Path) -> None:
    """Score every adapter and the bare base, and write a Markdown table.

    Raises:
        RuntimeError: an adapter scores too low, or the base too high.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = [
        "| Adapter | Answers with | Rank | Targets | Adapter | Adapter, bfloat16 | Base |",
        "|---|---|---|---|---|---|---|",
    ]
    failed: list[str] = []
    for task in TASKS:
        bare = _score(_model(base, None, torch.float32), tokenizer, task, _INPUTS)
        full = _score(_model(base, adapters / task.name, torch.float32), tokenizer, task, _INPUTS)
        half = _score(_model(base, adapters / task.name, torch.bfloat16), tokenizer, task, _INPUTS_BFLOAT16)
        _log.info("%s: adapter %.3f, in bfloat16 %.3f, base %.3f", task.name, full, half, bare)
        lines.append(f"| {task.name} | {task.description} | {_shape(task)} | {full:.1%} | {half:.1%} | {bare:.1%} |")
        if min(full, half) < _WANTED or bare >= _ALLOWED:
            failed.append(task.name)
    out.write_text("\n".join(lines) + "\n")
    if failed:
        raise RuntimeError(f"These tasks miss their scores: {', '.join(failed)}. Train for more steps.")


def _model(base: Path, adapter: Path | None, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to(dtype).eval()


def _score(model: Any, tokenizer: Any, task: Task, count: int) -> float:
    inputs = unseen_inputs(task, count)
    return exact_match(task, inputs, greedy_answers(model, tokenizer, [raw_prompt(text) for text in inputs]))


def _shape(task: Task) -> str:
    shape = SHAPES[task.name]
    targets = ", ".join(target.removesuffix("_proj") for target in shape.targets)
    return f"{shape.rank} | {targets}"
