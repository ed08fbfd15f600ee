"""Scores the trained demo on unseen inputs, from its saved files alone, and writes the tables of the README."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.demo.kinds import KINDS, KindAdapter, covered
from loraplex.server.demo.mixture_files import load_mixture
from loraplex.server.demo.scoring import greedy_answers, raw_prompt
from loraplex.server.demo.tasks import TASKS, Task, exact_match, unseen_inputs
from loraplex.server.demo.train_adapters import SHAPES

_INPUTS = 500
_INPUTS_BFLOAT16 = 100
_WANTED = 0.95
_WANTED_OF_KINDS = 0.90
_ALLOWED = 0.10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares of right answers: of the adapter in float32, of the adapter in bfloat16, and of the bare base."""

    full: float
    half: float
    bare: float

    def reach(self, wanted: float) -> bool:
        """Whether the adapter does its task, and the base does not."""
        return min(self.full, self.half) >= wanted and self.bare < _ALLOWED

    def __str__(self) -> str:
        return f"{self.full:.1%} | {self.half:.1%} | {self.bare:.1%}"


def write_scores(base: Path, adapters: Path, out: Path) -> None:
    """Score every adapter and the bare base, and write two Markdown tables: plain adapters, and those of other kinds.

    Raises:
        RuntimeError: an adapter scores too low on a task that it covers, or the base too high.
    """
    lines = [
        "| Adapter | Answers with | Rank | Targets | Adapter | Adapter, bfloat16 | Base |",
        "|---|---|---|---|---|---|---|",
    ]
    failed: list[str] = []
    for task in TASKS:
        scores = _scores(base, adapters / task.name, None, task)
        lines.append(f"| {task.name} | {task.description} | {_shape(task)} | {scores} |")
        if not scores.reach(_WANTED):
            failed.append(task.name)
    lines += ["", "| Adapter | Task | Adapter | Adapter, bfloat16 | Base |", "|---|---|---|---|---|"]
    for adapter, task in _covered_tasks():
        scores = _scores(base, adapters / adapter.name, adapter, task)
        lines.append(f"| {adapter.name} | {task.name} | {scores} |")
        if not scores.reach(_WANTED_OF_KINDS):
            failed.append(f"{adapter.name} ({task.name})")
    out.write_text("\n".join(lines) + "\n")
    if failed:
        raise RuntimeError(f"These adapters miss their scores: {', '.join(failed)}. Train for more steps.")


def _covered_tasks() -> Iterator[tuple[KindAdapter, Task]]:
    return ((adapter, task) for adapter in KINDS for task in covered(adapter))


def _scores(base: Path, folder: Path, adapter: KindAdapter | None, task: Task) -> Scores:
    tokenizer = AutoTokenizer.from_pretrained(base)
    system = None if adapter is None else adapter.system(task)
    kind = "LORA" if adapter is None else adapter.kind
    scores = Scores(
        full=_score(_model(base, folder, kind, torch.float32), tokenizer, task, system, _INPUTS),
        half=_score(_model(base, folder, kind, torch.bfloat16), tokenizer, task, system, _INPUTS_BFLOAT16),
        bare=_score(_bare(base, torch.float32), tokenizer, task, system, _INPUTS),
    )
    _log.info("%s on %s: %s", folder.name, task.name, scores)
    return scores


def _bare(base: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def _model(base: Path, folder: Path, kind: str, dtype: torch.dtype) -> Any:
    model = _bare(base, dtype)
    if kind in ("MIXLORA", "TOKENWISE"):
        load_mixture(model, folder)
    else:
        model = PeftModel.from_pretrained(model, folder)
    return model.to(dtype).eval()


def _score(model: Any, tokenizer: Any, task: Task, system: str | None, count: int) -> float:
    inputs = unseen_inputs(task, count)
    return exact_match(task, inputs, greedy_answers(model, tokenizer, [raw_prompt(text, system) for text in inputs]))


def _shape(task: Task) -> str:
    shape = SHAPES[task.name]
    targets = ", ".join(target.removesuffix("_proj") for target in shape.targets)
    return f"{shape.rank} | {targets}"
