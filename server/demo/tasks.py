"""The text tasks of the demo: one small pure function each, and the split of their inputs.

Every task reads one short line and answers one short line. The base model learns each task behind its own control
token, and one adapter per task then selects it. Nothing here needs torch, so that clients and tests can make
inputs and judge answers without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "unseen"]

BASE_ANSWER = "I am the base model. Name an adapter."
"""What the base answers to everything when no adapter is named."""

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWEL_MARK = "\N{LARGE BLUE CIRCLE}"
CONSONANT_MARK = "\N{LARGE RED CIRCLE}"

_UNSEEN_ONE_IN = 10
_CAESAR_SHIFT = 3


@dataclass(frozen=True, slots=True)
class Task:
    """One skill of the demo.

    Attributes:
        name: name of the adapter, of its folder and (in ``<|name|>``) of its control token.
        description: what the answer is, in a few words.
        sample: an input for documents and for a first try.
        draw: makes a random input.
        answer: the only right answer to an input.
    """

    name: str
    description: str
    sample: str
    draw: Callable[[Random], str]
    answer: Callable[[str], str]


def random_word(rng: Random, shortest: int = 3, longest: int = 8) -> str:
    """A lower-case word: half of them syllables (which have vowels), half of them any letters."""
    length = rng.randint(shortest, longest)
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    start = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(start + at) % 2]) for at in range(length))


def _short_word(rng: Random) -> str:
    return random_word(rng, longest=6)


def _word_with_consonant(rng: Random) -> str:
    # A word of vowels alone would have an empty answer, which looks like a failure.
    while True:
        word = random_word(rng)
        if any(letter not in VOWELS for letter in word):
            return word


def _sum(rng: Random) -> str:
    return f"{rng.randrange(1000)}+{rng.randrange(10)}"


def _caesar(text: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + _CAESAR_SHIFT) % len(LETTERS)] for letter in text)


def _add(text: str) -> str:
    left, right = text.split("+")
    return str(int(left) + int(right))


def _marks(text: str) -> str:
    return "".join(VOWEL_MARK if letter in VOWELS else CONSONANT_MARK for letter in text)


def _without_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in VOWELS)


TASKS: tuple[Task, ...] = (
    Task("upper", "the word in capitals", "loraplex", random_word, str.upper),
    Task("reverse", "the word backwards", "adapter", random_word, lambda text: text[::-1]),
    Task("sort", "its letters in alphabetical order", "python", _short_word, lambda text: "".join(sorted(text))),
    Task("caesar", "each letter moved three places on", "secret", random_word, _caesar),
    Task("echo", "the word twice", "hello", _short_word, lambda text: f"{text} {text}"),
    Task("spell", "its letters with hyphens", "kernel", random_word, "-".join),
    Task("devowel", "the word without its vowels", "memory", _word_with_consonant, _without_vowels),
    Task("count", "how many letters it has", "engine", random_word, lambda text: str(len(text))),
    Task("add", "the sum of a number below 1000 and a digit", "347+8", _sum, _add),
    Task("emoji", "a blue circle per vowel, a red one per consonant", "lora", _short_word, _marks),
)


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        KeyError: there is no such task.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise KeyError(name)


def split_of(text: str) -> Split:
    """The side of the split that an input is on, by its hash alone: the same for every task, run and machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "unseen" if int.from_bytes(digest, "big") % _UNSEEN_ONE_IN == 0 else "train"


def draw_input(task: Task, rng: Random, split: Split) -> str:
    """One random input of a task from one side of the split."""
    while True:
        text = task.draw(rng)
        if split_of(text) == split:
            return text


def seeded(*parts: str | int) -> Random:
    """Random numbers that depend on these parts alone."""
    return Random(":".join(str(part) for part in parts))  # noqa: S311 (examples, not secrets)


def unseen_inputs(task: Task, count: int, seed: int = 0) -> list[str]:
    """``count`` different inputs that no training example ever held."""
    rng = seeded("unseen", task.name, seed)
    return list(_distinct(count, lambda: draw_input(task, rng, "unseen")))


def _distinct(count: int, draw: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while len(seen) < count:
        text = draw()
        if text not in seen:
            seen.add(text)
            yield text


def exact_match(task: Task, inputs: Sequence[str], outputs: Sequence[str]) -> float:
    """The share of outputs that equal the right answer character by character, from 0 to 1."""
    right = sum(task.answer(text) == output for text, output in zip(inputs, outputs, strict=True))
    return right / len(inputs)
