"""Which row has which adapter, in the batches that work is counted for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

DECODE_MIXES = ("distinct", "uniform", "skewed", "identical", "half base", "mostly base")
PREFILL_MIXES = ("one prompt", "4 prompts", "32 prompts", "4 prompts, half base", "skewed prompts")
RANKS = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 64, 32)}

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Rows of a step.

    Attributes:
        adapters: [rows], ``NO_ADAPTER`` for base rows.
        sequences: how many they belong to.
    """

    name: str
    adapters: Int64Array
    sequences: int

    @property
    def num_rows(self) -> int:
        return len(self.adapters)


def decode_rows(mix: str, batch: int, seed: int = 0) -> BatchRows:
    """One row for each sequence; the popularity of adapters as Punica has it (https://arxiv.org/abs/2310.18547): each
    row its own, the square root of as many, Zipf's law of exponent 1.5, or one; and rows of the base between."""
    random = np.random.default_rng(seed)
    rows = np.arange(batch, dtype=np.int64)
    match mix:
        case "uniform":
            rows %= max(1, round(batch**0.5))
        case "skewed":
            rows = np.minimum(random.zipf(1.5, batch), 1 << 20).astype(np.int64)
        case "identical":
            rows[:] = 0
        case "half base":
            rows[::2] = NO_ADAPTER
        case "mostly base":
            rows[np.arange(batch) % 8 != 7] = NO_ADAPTER
    return BatchRows(mix, random.permutation(rows), batch)


def prefill_rows(mix: str, rows: int) -> BatchRows:
    """Prompts one after another, each under an adapter of its own or the base."""
    lengths = _prompt_lengths(mix, rows)
    adapters = np.arange(len(lengths), dtype=np.int64)
    if mix.endswith("half base"):
        adapters[::2] = NO_ADAPTER
    return BatchRows(mix, np.repeat(adapters, lengths), len(lengths))


def _prompt_lengths(mix: str, rows: int) -> Int64Array:
    if mix == "skewed prompts":
        lengths = []
        while rows > 1:
            lengths.append(-(-rows // 2))
            rows -= lengths[-1]
        return np.array([*lengths, rows] if rows else lengths, dtype=np.int64)
    count = 1 if mix == "one prompt" else int(mix.split()[0])
    edges = np.linspace(0, rows, count + 1).astype(np.int64)
    return np.diff(edges)
