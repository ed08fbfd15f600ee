"""Whatever a folder holds, it is read, or refused by the one error; and no loss changes a meaning in silence."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import AdapterSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MIXTURES = ["mixlora", "mola", "loramoe", "meteora", "tokenwise"]
FAMILIES = ["lora", "dora", "alora", "mixdora", *MIXTURES]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def any_family(request, save_peft, save_mixture) -> Path:
    """A small folder of the family that the test names."""
    family = request.param
    if family == "mixdora":
        return save_mixture("mixlora", use_dora=True, magnitudes=True, layers=(0,), num_experts=2)
    if family in MIXTURES:
        return save_mixture(family, layers=(0,), num_experts=2)
    options = {"dora": {"use_dora": True}, "alora": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}}
    return save_peft(**options.get(family, {}))[0]


every_family = pytest.mark.parametrize("any_family", FAMILIES, indirect=True)


def only_refused(folder: Path, shape: Any, base_weights: Any) -> None:
    """Reads a folder; whatever is wrong with it must be said by the one error, and no other."""
    for read in (
        lambda: read_adapter(folder, shape, dtype=torch.float16, base_weights=base_weights),
        lambda: read_adapter(folder, shape),
        lambda: describe_adapter(folder),
        lambda: identity_of(folder),
    ):
        with contextlib.suppress(AdapterFileError):
            read()


@every_family
@FUZZ
@given(data=st.data())
def test_any_configuration_is_read_or_refused(data, any_family, base_shape, base_weights):
    original = (any_family / CONFIG).read_text()
    mixture_keys = ["top_p", "temperature", "act_fn", "expert_lora", "routing_strategy", "use_dora"]
    known = st.sampled_from(sorted({*json.loads(original), *mixture_keys}))
    changes = data.draw(st.dictionaries(known | st.text(max_size=8), JSON_VALUES, max_size=3))
    try:
        (any_family / CONFIG).write_text(json.dumps({**json.loads(original), **changes}))
        only_refused(any_family, base_shape, base_weights)
    finally:
        (any_family / CONFIG).write_text(original)


@every_family
@FUZZ
@given(data=st.data())
def test_any_damage_to_the_bytes_is_read_or_refused(data, any_family, base_shape, base_weights):
    original = (any_family / TENSORS).read_bytes()
    place = st.integers(0, len(original) - 1) | st.integers(0, 900)
    edits = data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=6))
    end = data.draw(st.just(len(original)) | place)
    damaged = bytearray(original)
    for at, value in edits:
        damaged[at] = value
    try:
        (any_family / TENSORS).write_bytes(damaged[:end])
        only_refused(any_family, base_shape, base_weights)
    finally:
        (any_family / TENSORS).write_bytes(original)


@every_family
@FUZZ
@given(data=st.data())
def test_any_change_of_keys_shapes_and_values_is_read_or_refused(data, any_family, base_shape, base_weights):
    original = (any_family / TENSORS).read_bytes()
    tensors = load_file(any_family / TENSORS)
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
        save_file(tensors, any_family / TENSORS)
        only_refused(any_family, base_shape, base_weights)
    finally:
        (any_family / TENSORS).write_bytes(original)


# Each single loss: refused, or read with a warning, never in silence


def outcome(folder: Path, shape: Any, base_weights: Any) -> AdapterSpec | AdapterFileError:
    try:
        return read_adapter(folder, shape, base_weights=base_weights)
    except AdapterFileError as error:
        return error


@every_family
@pytest.mark.parametrize("change", ["drop", "rename", "reshape", "nan"])
def test_every_single_tensor_that_is_changed_is_noticed(change, any_family, tmp_path, base_shape, base_weights):
    tensors = load_file(any_family / TENSORS)
    assert isinstance(outcome(any_family, base_shape, base_weights), AdapterSpec)
    copy = tmp_path / "copy"
    shutil.copytree(any_family, copy)
    for key, tensor in tensors.items():
        changed = {name: value for name, value in tensors.items() if name != key}
        if change == "rename":
            changed[f"{key}.x"] = tensor
        elif change == "reshape":
            changed[key] = tensor.reshape(1, *tensor.shape)
        elif change == "nan":
            changed[key] = tensor.clone().index_fill_(0, torch.tensor([0]), float("nan"))
        save_file(changed, copy / TENSORS)
        result = outcome(copy, base_shape, base_weights)
        if isinstance(result, AdapterFileError):
            assert key.rsplit(".lora_", 1)[0] in result.message
        else:
            assert change == "drop"
            assert "magnitude" in key
            assert any(key in warning for warning in result.warnings)


@every_family
def test_every_truncation_is_refused(any_family, base_shape, base_weights):
    data = (any_family / TENSORS).read_bytes()
    for kept in [*range(0, 64, 7), *range(64, len(data), len(data) // 40), len(data) - 1]:
        (any_family / TENSORS).write_bytes(data[:kept])
        result = outcome(any_family, base_shape, base_weights)
        assert isinstance(result, AdapterFileError), kept
        assert result.key == TENSORS


@pytest.mark.parametrize("family", MIXTURES)
def test_every_key_of_the_configuration_that_is_lost_is_noticed_or_has_a_documented_default(
    family, save_mixture, base_shape, base_weights
):
    folder = save_mixture(family, routing_strategy=family, top_k=None if family == "loramoe" else 2)
    config = json.loads((folder / CONFIG).read_text())
    before = read_adapter(folder, base_shape, base_weights=base_weights)
    for key in config:
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        result = outcome(folder, base_shape, base_weights)
        if isinstance(result, AdapterFileError):
            assert key in result.message or key == "peft_type"
        else:
            assert key in ("top_k", "routing_strategy", "peft_type")
            assert (result.identity, result.routing) == (before.identity, before.routing)
