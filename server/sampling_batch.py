"""What a step samples with, as arrays: made on the host before the logits are there, so that choosing tokens waits for
nothing (see ``sampler.py``)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.server.request import Sequence

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to sample n rows.

    Attributes:
        num_rows: n.
        arrays: those that are not empty, by name; int64 but for those named otherwise. ``seen_rows``, ``seen_ids`` and
            ``seen_penalties`` (float32) [s]: logits under a repetition penalty. ``edit_rows``, ``edit_ids`` and
            ``edit_values`` (float32) [e]: additions to single logits, in their order. ``random_rows`` [r]: those that
            are drawn, the others take the best token; ``uniforms`` (float64) [r] in [0, 1), ``temperatures`` (float32)
            [r] above 0. ``plain`` [p] and ``filtered`` [f] divide 0 to r - 1; ``top_ks``, ``min_ps`` (float32) and
            ``top_ps`` (float64) [f].
        logprob_rows: int64 [m], rows whose log-probabilities are asked for.
        num_top: m, how many of the best tokens each of them reports.
    """

    num_rows: int
    arrays: Mapping[str, Array]
    logprob_rows: npt.NDArray[np.int64]
    num_top: tuple[int, ...]

    @classmethod
    def of(cls, sequences: SequenceOf[Sequence], vocabulary: int) -> SamplingBatch:
        """The batch of sequences that may each have a pending token, unless they need their history.

        Args:
            sequences: n.
            vocabulary: logits of a row; stop tokens behind them are none.
        """
        seen, edits = _Places(), _Places()
        drawn: list[tuple[int, Sequence]] = []
        logprob_rows: list[int] = []
        num_top: list[int] = []
        for row, sequence in enumerate(sequences):
            params = sequence.request.params
            if params.logprobs is not None:
                logprob_rows.append(row)
                num_top.append(params.logprobs)
            if sequence.output_counts is not None:
                _penalize(row, sequence, seen, edits)
            if params.logit_bias:
                edits.add(row, list(params.logit_bias), list(params.logit_bias.values()))
            if params.min_tokens and sequence.num_sampled < params.min_tokens:
                stops = [token for token in sequence.request.stop_ids if token < vocabulary]
                edits.add(row, stops, [float("-inf")] * len(stops))
            if params.temperature > 0:
                drawn.append((row, sequence))
        arrays: dict[str, Array] = {}
        if seen.rows:
            arrays |= seen.arrays("seen", "penalties")
        if edits.rows:
            arrays |= edits.arrays("edit", "values")
        if drawn:
            arrays |= _draws(drawn)
        return cls(len(sequences), arrays, np.array(logprob_rows, dtype=np.int64), tuple(num_top))


class _Places:
    """Single logits of the batch, by row and token, and a number for each."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._ids: list[int] = []
        self._numbers: list[float] = []

    def add(self, row: int, ids: Collection[int], numbers: SequenceOf[float]) -> None:
        self.rows += [row] * len(ids)
        self._ids += ids
        self._numbers += numbers

    def arrays(self, prefix: str, numbers: str) -> dict[str, Array]:
        return {
            f"{prefix}_rows": np.array(self.rows, dtype=np.int64),
            f"{prefix}_ids": np.array(self._ids, dtype=np.int64),
            f"{prefix}_{numbers}": np.array(self._numbers, dtype=np.float32),
        }


def _penalize(row: int, sequence: Sequence, seen: _Places, edits: _Places) -> None:
    """Weaken what came before. Presence and frequency count sampled tokens alone, repetition the prompt's too."""
    params, counts = sequence.request.params, sequence.output_counts
    assert counts is not None
    assert not sequence.num_pending, "a token that counts is not known yet"
    if params.repetition_penalty != 1.0:
        tokens = {*sequence.prompt_ids, *counts}
        seen.add(row, tokens, [params.repetition_penalty] * len(tokens))
    if params.presence_penalty or params.frequency_penalty:
        edits.add(row, counts, [-params.presence_penalty - params.frequency_penalty * n for n in counts.values()])


def _draws(drawn: list[tuple[int, Sequence]]) -> dict[str, Array]:
    """The arrays of rows that are drawn."""
    params = [sequence.request.params for _, sequence in drawn]
    temperatures = np.array([p.temperature for p in params], dtype=np.float32)
    arrays: dict[str, Array] = {
        "random_rows": np.array([row for row, _ in drawn], dtype=np.int64),
        "uniforms": np.array([_uniform(s.seed, s.num_sampled) for _, s in drawn], dtype=np.float64),
        # One that is 0 in float32 is as good as the smallest.
        "temperatures": np.maximum(temperatures, np.finfo(np.float32).tiny),
    }
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if len(filtered) < len(params):
        arrays["plain"] = np.delete(np.arange(len(params)), filtered)
    if filtered:
        arrays["filtered"] = np.array(filtered, dtype=np.int64)
        arrays["top_ks"] = np.array([params[i].top_k or np.iinfo(np.int64).max for i in filtered], dtype=np.int64)
        arrays["min_ps"] = np.array([params[i].min_p for i in filtered], dtype=np.float32)
        arrays["top_ps"] = np.array([params[i].top_p for i in filtered], dtype=np.float64)
    return arrays


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from the sequence's seed and how many tokens it has drawn: the same in any batch."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
