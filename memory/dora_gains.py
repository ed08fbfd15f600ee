"""DoRA's factors on the outputs of adapted matrices, computed once, when an adapter is read.

``gain = m / ||W + s B A||`` by rows (https://arxiv.org/abs/2402.09353). The norms need no ``W + s B A``::

    n_i^2 = |W_i|^2 + 2 s B_i . (A W_i) + s^2 B_i (A A^T) B_i^T

where ``W_i`` is row i. One pass over W serves all pairs of a matrix, such as the experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loraplex.memory.adapter_config import CONFIG_NAME
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import BaseWeights, LowRankPair
from loraplex.memory.serial_torch import one_thread

_CANCELLED = 1e-2
"""Where so little is left of the terms of a squared norm, their rounding shows: such rows are formed in full."""

_LARGEST_GRAM = 1024
"""Pairs are worked through together up to this sum of ranks, which bounds ``A A^T``; above it one is formed in full."""

_BLOCK_ELEMENTS = 1 << 17
"""Of a matrix, worked on at once: half a MiB of float32, which stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA's ``m``, [out_features] of any floating dtype, and the key it came under."""

    key: str
    values: torch.Tensor


def gains_of(
    pairs: Sequence[LowRankPair],
    magnitudes: Sequence[Magnitude],
    base_weights: BaseWeights | None,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """[out_features] float32 for each pair and its magnitude.

    Args:
        pairs: as read; their own ``gain`` is not looked at.
        magnitudes: of the pairs.
        base_weights: of the served base.
        dtype: in which the base is served: norms are those of the weights as served. None: as stored.

    Errors: AdapterFileError if there are no base weights, a norm is 0, or a gain is beyond the served dtype.
    """
    if base_weights is None:
        raise AdapterFileError(
            f"use_dora in {CONFIG_NAME}: DoRA scales the base's own outputs, so it can be read only with the base's "
            "weights at hand (--base MODEL on the command line)",
            key="use_dora",
        )
    with one_thread():
        return _gains(pairs, magnitudes, base_weights, dtype)


def _gains(
    pairs: Sequence[LowRankPair],
    magnitudes: Sequence[Magnitude],
    base_weights: BaseWeights,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    by_matrix: dict[tuple[str, int | None], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_matrix.setdefault((pair.site, pair.layer), []).append(index)
    gains: dict[int, torch.Tensor] = {}
    for (site, layer), indices in by_matrix.items():
        weight = _Weight(base_weights.matrix(site, layer), dtype, outputs_are_columns=site == "embed_tokens")
        for group in _groups(indices, pairs):
            norms = _norms(weight, [pairs[index] for index in group])
            for index, norm in zip(group, norms, strict=True):
                gains[index] = _gain(magnitudes[index], norm)
                _check_range(pairs[index], gains[index], magnitudes[index].key, dtype)
    return [gains[index] for index in range(len(pairs))]


def _groups(indices: Sequence[int], pairs: Sequence[LowRankPair]) -> list[list[int]]:
    """Pairs of one matrix, so many together as may share a pass over it."""
    groups: list[list[int]] = []
    total = _LARGEST_GRAM
    for index in indices:
        total += pairs[index].rank
        if total > _LARGEST_GRAM:
            groups.append([])
            total = pairs[index].rank
        groups[-1].append(index)
    return groups


@dataclass(frozen=True, slots=True)
class _Weight:
    """A matrix of the base, seen as [out, in] in float32; an embedding is stored as [in, out]."""

    stored: torch.Tensor
    dtype: torch.dtype | None
    outputs_are_columns: bool

    @property
    def num_outputs(self) -> int:
        return self.stored.shape[1 if self.outputs_are_columns else 0]

    def blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Outputs, inputs and the values there, of whole stored rows."""
        everything = slice(None)
        for part in _slices(self.stored.shape[0], self.stored.shape[1]):
            block = self._as_served(self.stored[part])
            if self.outputs_are_columns:
                yield everything, part, block.T
            else:
                yield part, everything, block

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """[n, in] of these outputs."""
        return self._as_served(self.stored[:, outputs].T if self.outputs_are_columns else self.stored[outputs])

    def _as_served(self, values: torch.Tensor) -> torch.Tensor:
        return (values if self.dtype is None else values.to(self.dtype)).float()


def _slices(rows: int, width: int) -> Iterator[slice]:
    """Consecutive rows, a block of elements at a time."""
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _norms(weight: _Weight, pairs: Sequence[LowRankPair]) -> list[torch.Tensor]:
    """[out] float64 of every pair of a group."""
    if pairs[0].rank > _LARGEST_GRAM:
        return [_direct(weight, torch.arange(weight.num_outputs), pairs[0])]
    stacked = torch.cat([pair.a.float() for pair in pairs])
    squares = torch.zeros(weight.num_outputs, dtype=torch.float64)
    products = torch.zeros(weight.num_outputs, stacked.shape[0])
    for outputs, inputs, block in weight.blocks():
        squares[outputs] += block.square().sum(1)
        products[outputs] += block @ stacked[:, inputs].T
    gram = torch.block_diag(*[pair.a.double() @ pair.a.double().T for pair in pairs])
    ranks = [pair.rank for pair in pairs]
    norms = [torch.empty(weight.num_outputs, dtype=torch.float64) for _ in pairs]
    for part in _slices(weight.num_outputs, stacked.shape[0]):
        b = torch.cat([pair.scale * pair.b[part].double() for pair in pairs], dim=1)
        crossed, updates = 2 * b * products[part], (b @ gram) * b
        shares = zip(crossed.split(ranks, dim=1), updates.split(ranks, dim=1), pairs, norms, strict=True)
        for cross, update, pair, norm in shares:
            norm[part] = _combined(weight, part, squares[part], cross.sum(1), update.sum(1), pair)
    return norms


def _combined(
    weight: _Weight,
    part: slice,
    squares: torch.Tensor,
    cross: torch.Tensor,
    update: torch.Tensor,
    pair: LowRankPair,
) -> torch.Tensor:
    """Norms of these rows from the three terms of their squares."""
    total = squares + cross + update
    norm = total.clamp(min=0).sqrt()
    doubtful = (total < _CANCELLED * (squares + update)).nonzero()[:, 0]
    if doubtful.numel():
        norm[doubtful] = _direct(weight, doubtful + part.start, pair)
    return norm


def _direct(weight: _Weight, outputs: torch.Tensor, pair: LowRankPair) -> torch.Tensor:
    """[n] float64: norms of these rows of ``W + s B A``, by blocks."""
    a = pair.a.double()
    return torch.cat(
        [
            (weight.rows(some).double() + pair.scale * (pair.b[some].double() @ a)).norm(dim=1)
            for some in outputs.split(max(1, _BLOCK_ELEMENTS // a.shape[1]))
        ]
    )


def _gain(magnitude: Magnitude, norm: torch.Tensor) -> torch.Tensor:
    bad = (~((norm > 0) & norm.isfinite())).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise AdapterFileError(
            f"{magnitude.key}: row {row} of the base's weight and its update has the length {norm[row].item()}; DoRA "
            "divides by it, so expected is a positive one",
            key=magnitude.key,
        )
    return (magnitude.values.double() / norm).float()


def _check_range(pair: LowRankPair, gain: torch.Tensor, key: str, dtype: torch.dtype | None) -> None:
    """Refuse gains that the served dtype cannot hold, alone or applied to B, which is how they are kept."""
    served = dtype or torch.float32
    largest = pair.b.abs().amax(dim=1).float() * gain
    if not (gain.to(served).isfinite().all() and largest.to(served).isfinite().all()):
        raise AdapterFileError(
            f"{key}: makes gains up to {gain.abs().max().item():.4g}, which with the update that they scale do not fit "
            f"the served model's {served}",
            key=key,
        )
