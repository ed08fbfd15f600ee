"""The optimizer of the demo's base model: Muon for the matrices of the layers, AdamW for all else.

Muon replaces each matrix of averaged gradients by the nearest orthogonal one, so that every direction of it moves
equally far. On these tasks it needs a fraction of AdamW's steps. ``torch.optim.Muon`` is not used because it works
in bfloat16, which is many times slower than float32 on most CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_MOMENTUM = 0.95
_DECAY = 0.05
_ITERATIONS = 5
# Coefficients of the quintic iteration of Jordan et al. (2024): fast, and near enough to orthogonal.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
# Brings the size of an orthogonal step to what AdamW would take, so that both share one learning rate.
_STEP_SIZE = 0.2


class MuonWithAdamW:
    """Both optimizers behind one ``step``.

    Args:
        matrices: two-dimensional weights for Muon.
        others: embeddings and norms for AdamW.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        self._matrices = list(matrices)
        self._averages = [torch.zeros_like(matrix) for matrix in self._matrices]
        self._adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients at this learning rate, then forget them."""
        for matrix, average in zip(self._matrices, self._averages, strict=True):
            if matrix.grad is None:
                continue
            average.lerp_(matrix.grad, 1 - _MOMENTUM)
            direction = orthogonalised(matrix.grad.lerp(average, _MOMENTUM))
            matrix.mul_(1 - rate * _DECAY)
            matrix.add_(direction, alpha=-rate * _STEP_SIZE * max(matrix.shape) ** 0.5)
            matrix.grad = None
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"averages": self._averages, "adamw": self._adamw.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state()`` of an earlier run."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """A nearly orthogonal matrix with the singular vectors of the given one (Newton-Schulz iteration)."""
    tall = matrix.size(0) > matrix.size(1)
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = _LINEAR * wide + (_CUBIC * gram + _QUINTIC * gram @ gram) @ wide
    result: torch.Tensor = wide.T if tall else wide
    return result
