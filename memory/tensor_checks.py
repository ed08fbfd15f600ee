"""What every tensor of an adapter must be: of the expected shape, of a floating dtype, finite, within range."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.serial_torch import SERIAL_ELEMENTS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(key: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Errors: AdapterFileError with both shapes; ``meaning`` says of what the expected one is."""
    if tuple(tensor.shape) != expected:
        raise AdapterFileError(
            f"{key}: shape {dims(tensor.shape)}, expected {dims(expected)}, {meaning}",
            key=key,
        )


def dims(shape: Iterable[int]) -> str:
    """A shape as messages show it."""
    return f"[{', '.join(map(str, shape))}]"


def check_values(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Errors: AdapterFileError for values that are no floats, not finite, or beyond the range of ``dtype``."""
    if tensor.dtype not in FLOAT_DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise AdapterFileError(f"{key}: dtype {name}, expected float16, bfloat16, float32 or float64", key=key)
    extremes = _extremes(tensor)
    if not extremes.isfinite().all():
        raise AdapterFileError(f"{key}: holds NaN or infinite values, expected finite ones", key=key)
    if dtype is not None and not extremes.to(dtype).isfinite().all():
        raise AdapterFileError(
            f"{key}: values up to {extremes.abs().max().item():.4g} do not fit the served model's {dtype}; its largest "
            f"is {torch.finfo(dtype).max:.4g}",
            key=key,
        )


def _extremes(tensor: torch.Tensor) -> torch.Tensor:
    """Smallest and largest values [2, n], by blocks; a NaN makes those of its block NaN."""
    blocks = tensor.reshape(-1).split(SERIAL_ELEMENTS)
    return torch.stack([torch.stack(torch.aminmax(block)) for block in blocks], dim=1)
