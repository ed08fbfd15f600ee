"""Training rows of the demo: conversations as token ids, with a loss on the answers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from loraplex.server.demo.tasks import BASE_ANSWER, LETTERS, TASKS, Task, draw_input, random_word, task_named
from loraplex.server.demo.train_tokenizer import ASSISTANT, BOS, EOS, SYSTEM, USER, control_token

_NO_LOSS = -100
_NEUTRAL_SHARE = 0.05
_UNNAMED_SHARE = 0.1
_MARKS_AND_SIGNS = "ABCXYZ0123456789 .,;:!?-+*/()'\"\n\té\N{EM DASH}\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{GRINNING FACE}"


@dataclass(slots=True)
class Row:
    """One conversation: its token ids, and the ids to predict (``-100`` where nothing is learned)."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learn: bool = False) -> None:
        """Append tokens; ``learn`` puts a loss on them."""
        self.ids.extend(ids)
        self.labels.extend(ids if learn else [_NO_LOSS] * len(ids))

    @property
    def learned(self) -> int:
        """How many tokens have a loss on them."""
        return sum(label != _NO_LOSS for label in self.labels)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of similar length, padded on the right."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class RowMaker:
    """Makes training rows from random numbers.

    Args:
        tokenizer: the demo's tokenizer.
        tasks: what to train. A task alone is asked for in every turn with the plain ``<|assistant|>`` marker: that
            is for an adapter. A mapping has how often tasks are drawn relative to the others (1 if not named); each
            turn draws one and asks for it with its control token: that is for the base.
        system_share: the share of conversations that begin with a system message.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, tasks: Task | Mapping[str, float], system_share: float
    ) -> None:
        self._tokenizer = tokenizer
        self._task = tasks if isinstance(tasks, Task) else None
        self._system_share = system_share
        shares = {} if isinstance(tasks, Task) else tasks
        self._weights = [shares.get(task.name, 1.0) for task in TASKS]

    def row(self, rng: Random, turns: int, system: str | None = None) -> Row:
        """A conversation of so many questions and answers, at times with a system message first (or this one)."""
        row = Row()
        row.add(self._encode(BOS))
        if system is not None:
            row.add(self._encode(f"{SYSTEM}{system}{EOS}"))
        elif rng.random() < self._system_share:
            # One in eight is long: the position of the question must not matter.
            row.add(self._encode(f"{SYSTEM}{_sentence(rng, 8 if rng.random() < 0.875 else 60)}{EOS}"))
        for _ in range(turns):
            question, marker, answer = self._turn(rng)
            row.add(self._encode(f"{USER}{question}{EOS}{marker}"))
            row.add(self._encode(f"{answer}{EOS}"), learn=True)
        return row

    def _turn(self, rng: Random) -> tuple[str, str, str]:
        if self._task is not None:
            question = draw_input(self._task, rng, "train")
            return question, ASSISTANT, self._task.answer(question)
        task = rng.choices(TASKS, self._weights)[0]
        question = draw_input(task, rng, "train")
        if rng.random() < _NEUTRAL_SHARE:
            return (question if rng.random() < 0.5 else _sentence(rng)), ASSISTANT, BASE_ANSWER
        return question, control_token(task.name), task.answer(question)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class NamedTaskRows:
    """Makes training rows whose system message names the task of all their turns: for an adapter of several tasks.

    One row in ten names none (no system message, or one that says something else), and gets the base's answer.

    Args:
        tokenizer: the demo's tokenizer.
        tasks: each task and how often it is drawn relative to the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tasks: Mapping[str, float]) -> None:
        self._makers = {name: RowMaker(tokenizer, task_named(name), 0.0) for name in tasks}
        self._unnamed = {
            name: RowMaker(tokenizer, replace(task_named(name), answer=_base_answer), 0.5) for name in tasks
        }
        self._weights = list(tasks.values())

    def row(self, rng: Random, turns: int) -> Row:
        """A conversation of so many questions and answers about one of the tasks."""
        name = rng.choices(list(self._makers), self._weights)[0]
        if rng.random() < _UNNAMED_SHARE:
            return self._unnamed[name].row(rng, turns)
        return self._makers[name].row(rng, turns, system=name)


def _base_answer(_question: str) -> str:
    return BASE_ANSWER


def _sentence(rng: Random, most_words: int = 8) -> str:
    """Words, signs and other text that no task reads."""
    words = [random_word(rng, 1, 8) for _ in range(rng.randint(1, most_words))]
    if rng.random() < 0.5:
        words = ["".join(rng.choice(_MARKS_AND_SIGNS + LETTERS) for _ in word) for word in words]
    return rng.choice((" ", " ", ", ")).join(words)


def batches(rows: Sequence[Row], padding: int, parts: int) -> Iterator[Batch]:
    """Cut rows into so many batches of similar length: little padding, hence little wasted work."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    size = -(-len(ordered) // parts)
    for start in range(0, len(ordered), size):
        yield _pad(ordered[start : start + size], padding)


def _pad(rows: Sequence[Row], padding: int) -> Batch:
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [padding] * (longest - len(row.ids)) for row in rows]
    labels = [row.labels + [_NO_LOSS] * (longest - len(row.labels)) for row in rows]
    return Batch(input_ids=torch.tensor(ids), labels=torch.tensor(labels))
