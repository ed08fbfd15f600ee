"""The demo's adapters that are no plain LoRA: which tasks each covers, and how it is asked. Imports no torch.

An adapter of several tasks learns which one is wanted from a system message that is the task's name alone. An adapter
of one task is asked like those of ``tasks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraplex.server.demo.tasks import Task, task_named

BASE_NAME = "loraplex-demo"
"""The base that every adapter's configuration names."""


@dataclass(frozen=True, slots=True)
class KindAdapter:
    """An adapter of the demo that shows another kind than plain LoRA.

    Attributes:
        name: of the adapter and its folder.
        kind: what it is; ``DORA`` has ``peft_type`` LORA and ``use_dora`` in its configuration.
        description: what it is, in a few words.
        tasks: names of the tasks that it does.
    """

    name: str
    kind: Literal["MIXLORA", "TOKENWISE", "DORA"]
    description: str
    tasks: tuple[str, ...]

    def system(self, task: Task) -> str | None:
        """The system message that asks for a task, or ``None`` if there is but one to ask for.

        Raises:
            ValueError: the adapter does not cover the task.
        """
        if task.name not in self.tasks:
            raise ValueError(f"task: {self.name} does not do {task.name!r}; it does {', '.join(self.tasks)}.")
        return task.name if len(self.tasks) > 1 else None

    def messages(self, task: Task, question: str) -> list[dict[str, str]]:
        """The chat that asks one question of a task.

        Raises:
            ValueError: the adapter does not cover the task.
        """
        system = self.system(task)
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": question}]


KINDS: tuple[KindAdapter, ...] = (
    KindAdapter(
        "words-mixlora", "MIXLORA", "four experts in each MLP, two per token", ("upper", "spell", "echo", "count")
    ),
    KindAdapter(
        "words-tokenwise", "TOKENWISE", "one route per token for all layers", ("reverse", "caesar", "devowel", "emoji")
    ),
    KindAdapter("reverse-dora", "DORA", "a LoRA with trained magnitudes", ("reverse",)),
)


def covered(adapter: KindAdapter) -> tuple[Task, ...]:
    """The tasks of an adapter."""
    return tuple(task_named(name) for name in adapter.tasks)


def kind_named(name: str) -> KindAdapter:
    """The adapter of that name.

    Raises:
        KeyError: there is no such adapter.
    """
    for adapter in KINDS:
        if adapter.name == name:
            return adapter
    raise KeyError(name)
