"""Where the demo's files are, and what to ask its adapters. Imports neither torch nor Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplex.server.demo.kinds import KINDS
from loraplex.server.demo.tasks import BASE_ANSWER, TASKS

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Sample:
    """A question for one adapter (or for the base, if ``adapter`` is ``None``), and its right answer."""

    adapter: str | None
    description: str
    question: str
    answer: str


def base_folder() -> Path:
    """The folder of the base model and its tokenizer."""
    return _HERE / "base"


def adapters_folder() -> Path:
    """The folder that holds one folder per adapter."""
    return _HERE / "adapters"


def demo_adapters() -> dict[str, Path]:
    """The plain adapters by name, in the order of the tasks."""
    return {task.name: adapters_folder() / task.name for task in TASKS}


def kind_adapters() -> dict[str, Path]:
    """The adapters of other kinds by name, in the order of their table."""
    return {kind.name: adapters_folder() / kind.name for kind in KINDS}


def samples() -> list[Sample]:
    """One question per adapter with its answer, and last the first of them to the base."""
    asked = [Sample(task.name, task.description, task.sample, task.answer(task.sample)) for task in TASKS]
    return [*asked, Sample(None, "one fixed sentence", asked[0].question, BASE_ANSWER)]
