"""Makes the demo from nothing: ``python -m loraplex.server.demo.train --out DIR``.

The stages are the tokenizer, the base model (every task behind a control token), and the adapters: one per task, and
those of other kinds. Each reads what the one before it wrote, so one stage can be run again alone; the base continues
from its checkpoint after an interruption. Seeds are fixed, and every training step draws its own examples from its
number: the same versions, machine and number of threads give the same weights. Needs ``loraplex[demo]``.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Annotated

import torch
import typer
from rich.logging import RichHandler
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from loraplex.server.demo.kinds import KINDS, covered, kind_named
from loraplex.server.demo.tasks import task_named
from loraplex.server.demo.train_adapters import DORA_SHAPES, SHAPES, train_adapter
from loraplex.server.demo.train_base import CONTEXT, STEPS, train_base
from loraplex.server.demo.train_mixtures import RECIPES, train_mixture
from loraplex.server.demo.train_scores import write_scores
from loraplex.server.demo.train_tokenizer import save_tokenizer

_log = logging.getLogger(__name__)


class Stage(StrEnum):
    """A part of the work."""

    TOKENIZER = "tokenizer"
    BASE = "base"
    ADAPTERS = "adapters"
    SCORES = "scores"
    ALL = "all"


def train(
    out: Annotated[Path, typer.Option(help="Folder to write base/, adapters/ and scores.md into.")],
    stage: Annotated[Stage, typer.Option(help="What to make.")] = Stage.ALL,
    steps: Annotated[int, typer.Option(help="Training steps of the base.")] = STEPS,
    adapter: Annotated[list[str] | None, typer.Option(help="Train only these adapters (default: all).")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; their number changes the last digits.")] = 1,
) -> None:
    """Make the demo's tokenizer, base model, adapters and score table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    disable_progress_bar()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    base, adapters = out / "base", out / "adapters"
    base.mkdir(parents=True, exist_ok=True)
    for part in Stage:
        if part is Stage.ALL or stage not in (part, Stage.ALL):
            continue
        started = monotonic()
        if part is Stage.TOKENIZER:
            save_tokenizer(base, CONTEXT)
        elif part is Stage.BASE:
            train_base(AutoTokenizer.from_pretrained(base), base, out / "checkpoint.pt", steps)
        elif part is Stage.ADAPTERS:
            tokenizer = AutoTokenizer.from_pretrained(base)
            for name in adapter or [*SHAPES, *(kind.name for kind in KINDS)]:
                _train_adapter(tokenizer, base, adapters / name, name)
        else:
            write_scores(base, adapters, out / "scores.md")
        _log.info("%s: done in %.0f s", part, monotonic() - started)


def _train_adapter(tokenizer: PreTrainedTokenizerFast, base: Path, out: Path, name: str) -> None:
    if name in RECIPES:
        train_mixture(tokenizer, base, out, kind_named(name))
    elif name in DORA_SHAPES:
        (task,) = covered(kind_named(name))
        train_adapter(tokenizer, base, out, task, DORA_SHAPES[name])
    else:
        train_adapter(tokenizer, base, out, task_named(name), SHAPES[name])


if __name__ == "__main__":
    typer.run(train)
