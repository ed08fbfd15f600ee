"""Where the tensors of a safetensors file lie.

The library unpacks bytes only by copying each tensor, without letting other threads run meanwhile, or maps the file,
which ends the process if somebody truncates it. So a server reads the header itself:
https://huggingface.co/docs/safetensors/index#format. Eight bytes of length, little-endian; JSON by name with dtype,
shape and the positions of its bytes behind the header, which together cover the rest of the file without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's dtype and shape, and its bytes: ``start`` to ``stop`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def unpack_safetensors(data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors by name, as views of a file's bytes ``data [n] uint8``; copies where the bytes are not aligned.

    Errors: ValueError saying what is wrong with the header.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in parse_header(data.numpy().data).items():
        part = data[stored.start : stored.stop]
        if stored.start % stored.dtype.itemsize:
            part = part.clone()
        tensors[name] = part.view(stored.dtype).view(stored.shape)
    return tensors


def header_of(data: memoryview) -> bytes | None:
    """The header of a file of these bytes, its length included; None where the file is too short for it."""
    stop = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return bytes(data[:stop]) if _LENGTH_BYTES <= stop <= len(data) else None


def parse_header(data: memoryview) -> Mapping[str, StoredTensor]:
    """What a file of these bytes holds, by name.

    Errors: ValueError.
    """
    if len(data) < _LENGTH_BYTES:
        raise ValueError("the header is too short")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if length > _MAX_HEADER or start > len(data):
        raise ValueError(f"the header takes {length} bytes, but the file has {len(data)}")
    tensors: dict[str, StoredTensor] = {}
    for name, value in _entries(bytes(data[_LENGTH_BYTES:start])):
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        if name != _METADATA:
            tensors[name] = _stored(name, value, start)
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != end:
            raise ValueError(f"{name} begins at byte {stored.start} instead of {end}")
        end = stored.stop
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end}, the file at {len(data)}")
    return tensors


def _entries(header: bytes) -> list[tuple[str, object]]:
    """The names of the header's object, those that are there twice included."""
    objects: list[list[tuple[str, object]]] = []

    def note(pairs: list[tuple[str, object]]) -> dict[str, object]:
        objects.append(pairs)
        return dict(pairs)

    try:
        parsed = json.loads(header.decode(), object_pairs_hook=note)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("the header is no JSON object")
    return objects[-1]  # the outermost one is complete last


def _stored(name: str, value: object, header_end: int) -> StoredTensor:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    dtype, shape = value["dtype"], _naturals(value["shape"])
    offsets = _naturals(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name}: unknown dtype {dtype}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"{name}: expected numbers in shape and two in data_offsets")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{name}: {offsets[1] - offsets[0]} bytes, but its shape and dtype take {size}")
    return StoredTensor(_DTYPES[dtype], tuple(shape), header_end + offsets[0], header_end + offsets[1])


def _naturals(value: object) -> list[int] | None:
    """A list of whole numbers from 0 on."""
    if not isinstance(value, list):
        return None
    for item in value:
        if type(item) is not int or not 0 <= item < 1 << 63:
            return None
    return value
