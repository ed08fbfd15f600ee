"""What every tensor of an adapter must be: of the expected shape, of a floating dtype, finite, within range."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import torch

from loraplex.memory.adapter_errors import AdapterFileError

_INTEGERS = {
    2: (torch.int16, "u2"),
    4: (torch.int32, "u4"),
    8: (torch.int64, "u8"),
}  # by bytes, as torch and as numpy has them
_FORMATS = {2: ("e", "H"), 4: ("f", "I"), 8: ("d", "Q")}  # as ``struct`` has them
_BLOCK = 1 << 17  # elements, that stay in a core's cache for the second pass
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
    if values_fit(tensor, dtype):
        return
    if tensor.dtype not in FLOAT_DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise AdapterFileError(f"{key}: dtype {name}, expected float16, bfloat16, float32 or float64", key=key)
    largest = _value_of(_largest_bits(tensor), tensor.dtype)
    if not math.isfinite(largest):
        raise AdapterFileError(f"{key}: holds NaN or infinite values, expected finite ones", key=key)
    if dtype is not None:
        raise AdapterFileError(
            f"{key}: values up to {largest:.4g} do not fit the served model's {dtype}; its largest is "
            f"{torch.finfo(dtype).max:.4g}",
            key=key,
        )


def values_fit(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``check_values`` accepts them."""
    if tensor.dtype not in FLOAT_DTYPES:
        return False
    largest = _value_of(_largest_bits(tensor), tensor.dtype)
    return math.isfinite(largest) and (dtype is None or dtype == tensor.dtype or _fits(largest, dtype))


def _fits(value: float, dtype: torch.dtype) -> bool:
    """Whether a value is finite in ``dtype``, rounded."""
    return value <= torch.finfo(dtype).max or math.isfinite(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def _largest_bits(tensor: torch.Tensor) -> int:
    """Those of the largest magnitude, without a sign; 0 where there is no value.

    Without their signs floating-point numbers are in the order of their bits as integers, with infinity and the NaNs
    behind all others. As signed integers the positive ones are, as unsigned ones the negative ones behind them.
    """
    signed, unsigned = _INTEGERS[tensor.dtype.itemsize]
    bits = tensor.reshape(-1).view(signed).numpy()
    largest, mask = 0, torch.iinfo(signed).max
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        largest = max(largest, int(block.max()), int(block.view(unsigned).max()) & mask)
    return largest


def _value_of(bits: int, dtype: torch.dtype) -> float:
    """The number that has these bits."""
    if dtype == torch.bfloat16:
        bits, dtype = bits << 16, torch.float32
    number, integer = _FORMATS[dtype.itemsize]
    return float(struct.unpack(number, struct.pack(integer, bits))[0])
