from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.memory.adapter_convert import AdapterContent, in_modern_form, write_adapter
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import BaseShape, BaseWeights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONTENT = AdapterContent({"r": 1}, {"a": torch.ones(2, 3)})
SaveMixture = Callable[..., Path]


def accept(folder: Path) -> None:
    """A check that passes."""
    assert (folder / WEIGHTS).is_file()


def refuse(folder: Path) -> None:
    """A check that does not."""
    raise AdapterFileError(f"{folder.name} is refused")


def pickled(folder: Path) -> Path:
    """The folder with its weights as ``.bin``."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def test_a_written_folder_holds_the_content_and_can_be_read_by_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shared = torch.arange(6.0).view(2, 3)
    config = {"rank_pattern": {"b": 2, "a": 1}, "r": 8}
    write_adapter(AdapterContent(config, {"x": shared, "y": shared.T, "z": shared[:1]}), out, check=accept)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (out, out / CONFIG, out / WEIGHTS)]
    assert modes == [0o755, 0o644, 0o644]
    written = load_file(out / WEIGHTS)
    assert torch.equal(written["y"], shared.T)
    assert torch.equal(written["z"], shared[:1])
    # The order of patterns decides which of them counts.
    assert list(json.loads((out / CONFIG).read_text())["rank_pattern"]) == ["b", "a"]


def test_nothing_is_left_of_a_folder_that_does_not_pass_its_check(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="refused"):
        write_adapter(CONTENT, tmp_path / "out", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_adapter(CONTENT, out, check=accept)
    other = AdapterContent({"r": 2}, CONTENT.tensors)
    with pytest.raises(AdapterFileError, match=r"out: exists already"):
        write_adapter(other, out, check=accept)
    with pytest.raises(AdapterFileError, match="refused"):
        write_adapter(other, out, replace=True, check=refuse)
    assert json.loads((out / CONFIG).read_text()) == {"r": 1}
    write_adapter(other, out, replace=True, check=accept)
    assert json.loads((out / CONFIG).read_text()) == {"r": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes").write_text("mine")
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    write_adapter(CONTENT, tmp_path / "adapter", check=accept)
    link.symlink_to(tmp_path / "adapter")
    for path in (precious, file, link):
        with pytest.raises(AdapterFileError, match="not an adapter's folder"):
            write_adapter(CONTENT, path, replace=True, check=accept)
    assert (precious / "notes").read_text() == file.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"nowhere/out: cannot be written: No such file"):
        write_adapter(CONTENT, tmp_path / "nowhere" / "out", check=accept)


@pytest.mark.parametrize("naming", ["modern", "oldest", "package", "alias"])
def test_every_naming_of_mixlora_becomes_the_modern_one(save_mixture: SaveMixture, naming: str) -> None:
    modern = load_file(save_mixture("mixlora", name="modern") / WEIGHTS)
    content = in_modern_form(pickled(save_mixture("mixlora", naming=naming)), allow_bin=True)
    assert content.tensors.keys() == modern.keys()
    assert all(torch.equal(content.tensors[key], modern[key]) for key in modern)


@pytest.mark.parametrize(
    ("strategy", "written"),
    [("mixtral", "mixlora"), ("switch", "mixlora-switch"), ("mixlora-dynamic", "mixlora-dynamic")],
)
def test_a_converted_mixlora_computes_what_the_old_one_does(
    save_mixture: SaveMixture,
    tmp_path: Path,
    base_shape: BaseShape,
    edit_config: Callable[..., None],
    strategy: str,
    written: str,
) -> None:
    folder = pickled(save_mixture("mixlora", naming="oldest", peft_type=None, routing_strategy=strategy))
    edit_config(folder, lora_dropout=0.1, expert_lora={"r": 4, "lora_alpha": 3})
    content = in_modern_form(folder, allow_bin=True)
    write_adapter(content, tmp_path / "out", check=lambda path: read_adapter(path, base_shape))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["peft_type"], config["routing_strategy"]) == ("MIXLORA", written)
    old, new = read_adapter(folder, base_shape, allow_bin=True), read_adapter(tmp_path / "out", base_shape)
    assert (new.kind, new.routing) == ("mixlora", old.routing)
    assert len(new.pairs) == len(old.pairs)
    for left, right in zip(old.pairs, new.pairs):
        assert (left.site, left.layer, left.expert, left.scale) == (right.site, right.layer, right.expert, right.scale)
        assert torch.equal(left.a, right.a)
        assert torch.equal(left.b, right.b)
    for left, right in zip(old.routers, new.routers, strict=True):
        assert (left.layer, left.site) == (right.layer, right.site)
        assert torch.equal(left.weight, right.weight)


def test_magnitudes_of_experts_are_renamed_with_them(
    save_mixture: SaveMixture, tmp_path: Path, base_shape: BaseShape, base_weights: BaseWeights
) -> None:
    folder = save_mixture("mixlora", naming="alias", magnitudes=True, use_dora=True)
    content = in_modern_form(folder)
    assert "mixlora.layers.0.mlp.up_proj.experts.1.lora_magnitude_vector" in content.tensors
    write_adapter(content, tmp_path / "out", check=accept)
    old = read_adapter(folder, base_shape, base_weights=base_weights)
    new = read_adapter(tmp_path / "out", base_shape, base_weights=base_weights)
    for left, right in zip(old.pairs, new.pairs, strict=True):
        assert left.gain is not None
        assert right.gain is not None
        assert torch.equal(left.gain, right.gain)


def test_dtypes_stay_as_they_are(save_mixture: SaveMixture, tmp_path: Path, edit_tensors: Callable[..., None]) -> None:
    folder = save_mixture("mixlora", naming="oldest")
    edit_tensors(folder, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    write_adapter(in_modern_form(folder), tmp_path / "out", check=accept)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_two_namings_of_one_tensor_are_refused_by_both_keys(save_mixture: SaveMixture) -> None:
    folder = save_mixture("mixlora", naming="oldest")
    tensors = load_file(folder / WEIGHTS)
    twice = "mixlora.layers.1.mlp.gate_proj.experts.0.lora_A.weight"
    tensors[twice] = torch.zeros(4, 32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"second tensor for mixlora\.layers\.1\.mlp\.gate_proj\.experts\.0"):
        in_modern_form(folder)


def test_other_adapters_are_only_stored_anew(save_peft: Callable[..., tuple[Path, Any]], base_shape: BaseShape) -> None:
    folder, _ = save_peft()
    tensors = load_file(folder / WEIGHTS)
    content = in_modern_form(pickled(folder), allow_bin=True)
    assert content.tensors.keys() == tensors.keys()
    assert content.config == json.loads((folder / CONFIG).read_text())


def test_pickled_weights_are_read_only_when_allowed(save_mixture: SaveMixture) -> None:
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin"):
        in_modern_form(pickled(save_mixture("mixlora")))
