"""Reading checkpoints: what is wrong with a broken one is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.checkpoint import CheckpointError, find_checkpoint, read_config
from loraplex.server.traits import read_traits
from loraplex.server.weights import CheckpointReader, DecoderWeights, load_weights

EditTensors = Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], None]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def load(folder: Path, progress: Any = None) -> DecoderWeights:
    traits = read_traits(read_config(folder))
    return load_weights(CheckpointReader(folder, progress), traits, torch.float32, torch.device("cpu"))


@pytest.fixture
def folder(checkpoints: Callable[[str], Any], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("llama").folder, tmp_path / "llama")


@pytest.fixture
def sharded(checkpoints: Callable[[str], Any], tmp_path: Path) -> Path:
    checkpoints("llama").model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", K_PROJ, "model.layers.2.mlp.up_proj.weight"],
)
def test_a_missing_tensor_is_named(folder: Path, edit_tensors: EditTensors, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing") as caught:
        load(folder)
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", K_PROJ, "model.layers.0.input_layernorm.weight"])
def test_a_wrong_shape_is_named_with_the_right_one(folder: Path, edit_tensors: EditTensors, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(7, 5)}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[7, 5\], the configuration asks for") as caught:
        load(folder)
    assert caught.value.param == name


def test_a_bias_that_the_configuration_does_not_have_is_named(folder: Path, edit_tensors: EditTensors) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=f"LlamaForCausalLM does not have: {name}") as caught:
        load(folder)
    assert caught.value.param == name


def test_derived_rotary_frequencies_of_old_checkpoints_are_ignored(folder: Path, edit_tensors: EditTensors) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert len(load(folder).layers) == 3


def test_fewer_layers_than_the_file_holds_is_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.2\."):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{shard.name} cannot be read") as caught:
        load(sharded)
    assert caught.value.param is not None


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names files that are missing: {shard.name}"):
        load(sharded)


def test_a_shard_that_lacks_what_the_index_promises_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    wrong = next(name for name in content["weight_map"].values() if name != content["weight_map"][K_PROJ])
    content["weight_map"][K_PROJ] = wrong
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{wrong} cannot be read") as caught:
        load(sharded)
    assert caught.value.param == K_PROJ


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}']
)
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(sharded)


def test_an_index_may_not_lead_out_of_the_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][K_PROJ]
    (sharded / shard).rename(sharded.parent / shard)
    index.write_text(index.read_text().replace(shard, f"../{shard}"))
    with pytest.raises(CheckpointError, match=r"\.\./"):
        load(sharded)


def test_other_formats_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "no-such-model"}'])
def test_a_broken_configuration_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(find_checkpoint(str(tmp_path)))


def test_progress_rises_to_the_whole(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights = load(sharded, lambda done, total: seen.append((done, total)))
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {sum(file.stat().st_size for file in sharded.glob("*.safetensors"))}
    assert done[-1] == 4 * weights.num_parameters <= seen[-1][1]


def test_parameters_are_counted_once_each(checkpoints: Callable[[str], Any]) -> None:
    for name in ("llama", "llama3", "qwen3"):
        model = checkpoints(name).model
        assert load(checkpoints(name).folder).num_parameters == model.num_parameters()
