"""A safetensors file is unpacked as the library does it, or refused where the library refuses it."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.safetensors_header import unpack_safetensors

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8]


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    return unpack_safetensors(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def packed(header: Any, num_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), shapes),
        max_size=5,
    ),
    st.booleans(),
)
def test_what_the_library_saves_is_unpacked(stored, metadata):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in stored.items()}
    data = safetensors.torch.save(tensors, {"format": "pt"} if metadata else None)
    found = unpack(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_are_views_of_the_bytes_and_copies_only_where_they_are_not_aligned():
    header = packed({"b": entry(0, 3, [3], "U8"), "a": entry(3, 11)}, 11)
    data = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    data[-8:] = torch.tensor([1.5, -2.0]).view(torch.uint8)
    found = unpack_safetensors(data)
    assert found["a"].tolist() == [1.5, -2.0]
    data[-11] = 7
    assert found["b"].tolist() == [7, 0, 0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 62),
        packed(b"[]"),
        packed(b"{"),
        packed(b"\xff\xfe"),
        packed(b"[" * 100_000),
        packed(b'{"a": %s}' % json.dumps(entry(0, 4)).encode(), 3),
        packed({"a": entry(0, 4)}, 5),
        packed({"a": entry(4, 8)}, 8),
        packed({"a": entry(0, 4), "b": entry(8, 12)}, 12),
        packed({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        packed({"a": entry(0, 8, [3])}, 8),
        packed({"a": entry(0, 8, [-1, -2])}, 8),
        packed({"a": entry(0, 4, [True])}, 4),
        packed({"a": entry(0, 4, [1.0])}, 4),  # type: ignore[list-item]
        packed({"a": entry(8, 4, [1])}, 8),
        packed({"a": entry(0, 4, dtype="F33")}, 4),
        packed({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
        packed({"a": {"dtype": "F32", "shape": [1]}}, 4),
        packed({"a": [0, 4]}, 4),
        packed(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4),
        packed({"a": entry(0, 4, [1 << 62, 1 << 62])}, 4),
    ],
)
def test_what_is_no_file_of_this_kind_is_refused(data):
    with pytest.raises(ValueError, match=r".+"):
        unpack(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_refused_or_gives_what_the_library_gives(data):
    original = safetensors.torch.save({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)})
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    try:
        found = unpack(bytes(damaged))
    except ValueError:
        return
    expected = safetensors.torch.load(bytes(damaged))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)
