"""Whatever a folder holds, it is read, or refused by the one error."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, read_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only_refused(folder: Path, shape: Any) -> None:
    """Reads a folder; whatever is wrong with it must be said by the one error, and no other."""
    for read in (lambda: read_adapter(folder, shape, dtype=torch.float16), lambda: describe_adapter(folder)):
        with contextlib.suppress(AdapterFileError):
            read()


@FUZZ
@given(data=st.data())
def test_any_configuration_is_read_or_refused(data, folder, base_shape):
    original = (folder / CONFIG).read_text()
    known = st.sampled_from(sorted(json.loads(original)))
    changes = data.draw(st.dictionaries(known | st.text(max_size=8), JSON_VALUES, max_size=3))
    try:
        (folder / CONFIG).write_text(json.dumps({**json.loads(original), **changes}))
        only_refused(folder, base_shape)
    finally:
        (folder / CONFIG).write_text(original)


@FUZZ
@given(data=st.data())
def test_any_damage_to_the_bytes_is_read_or_refused(data, folder, base_shape):
    original = (folder / TENSORS).read_bytes()
    place = st.integers(0, len(original) - 1) | st.integers(0, 900)
    edits = data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=6))
    end = data.draw(st.just(len(original)) | place)
    damaged = bytearray(original)
    for at, value in edits:
        damaged[at] = value
    try:
        (folder / TENSORS).write_bytes(damaged[:end])
        only_refused(folder, base_shape)
    finally:
        (folder / TENSORS).write_bytes(original)


@FUZZ
@given(data=st.data())
def test_any_change_of_keys_shapes_and_values_is_read_or_refused(data, folder, base_shape):
    original = (folder / TENSORS).read_bytes()
    tensors = load_file(folder / TENSORS)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3, unique=True)):
        tensor = tensors.pop(key)
        change = data.draw(st.sampled_from(["drop", "rename", "reshape", "nan", "dtype", "scalar"]))
        if change == "rename":
            tensors[key.replace(data.draw(st.sampled_from(key.split("."))), data.draw(st.text(max_size=6)))] = tensor
        elif change == "reshape":
            tensors[key] = torch.ones(data.draw(st.lists(st.integers(0, 5), max_size=4)))
        elif change == "nan":
            tensors[key] = tensor.fill_(float("nan"))
        elif change == "dtype":
            tensors[key] = tensor.to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.complex64])))
        elif change == "scalar":
            tensors[key] = torch.tensor(1.0)
    try:
        save_file(tensors, folder / TENSORS)
        only_refused(folder, base_shape)
    finally:
        (folder / TENSORS).write_bytes(original)
