"""Adapter folders: what is found, described, read, and refused."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, find_adapters, read_adapter

CONFIG, TENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def refused(folder: Path | str, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert str(caught.value) == caught.value.message


def test_a_missing_folder_is_refused(tmp_path, base_shape):
    refused(tmp_path / "nowhere", base_shape, "no such folder", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("path", ["bad\0path", "x" * 5000])
def test_what_cannot_be_a_path_is_refused(path, base_shape):
    with pytest.raises(AdapterFileError, match=r"not a path|no such folder"):
        read_adapter(path, base_shape)


def test_a_file_in_place_of_a_folder_is_refused(folder, base_shape):
    refused(folder / CONFIG, base_shape, "not a folder", str(folder / CONFIG))


def test_a_missing_configuration_is_refused(folder, base_shape):
    (folder / CONFIG).unlink()
    refused(folder, base_shape, "cannot be read: No such file", CONFIG)


def test_missing_tensors_are_refused(folder, base_shape):
    (folder / TENSORS).unlink()
    refused(folder, base_shape, "no such file", TENSORS)
    with pytest.raises(AdapterFileError, match=TENSORS):
        describe_adapter(folder)


def test_a_broken_link_is_refused(folder, base_shape):
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(folder / "gone")
    refused(folder, base_shape, "no such file", TENSORS)


def test_links_are_followed_as_the_hub_cache_needs(folder, base_shape, tmp_path):
    shutil.move(folder / TENSORS, tmp_path / "blob")
    (folder / TENSORS).symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(folder)
    assert read_adapter(tmp_path / "link", base_shape)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_named_pipe_is_refused_without_waiting(name, folder, base_shape):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, base_shape, "expected a regular file", name)
    with pytest.raises(AdapterFileError, match=name):
        describe_adapter(folder)


def test_a_folder_in_place_of_the_tensors_is_refused(folder, base_shape):
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()
    refused(folder, base_shape, TENSORS, TENSORS)


def test_a_file_above_the_limit_is_refused_with_both_numbers(folder, base_shape):
    size = (folder / TENSORS).stat().st_size
    assert read_adapter(folder, base_shape, max_bytes=size)
    refused(folder, base_shape, rf"{size} bytes; at most {size - 1}", TENSORS, max_bytes=size - 1)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(kept, folder, base_shape):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:kept])
    refused(folder, base_shape, "corrupt or truncated", TENSORS)
    with pytest.raises(AdapterFileError, match=TENSORS):
        describe_adapter(folder)


def test_a_header_of_absurd_length_is_refused(folder, base_shape):
    (folder / TENSORS).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(folder, base_shape, "corrupt or truncated", TENSORS)


def test_control_characters_of_a_key_do_not_reach_the_message(folder, base_shape, edit_tensors):
    edit_tensors(folder, lambda tensors: tensors.update({"evil\n\x1b[31m" + "k" * 5000: torch.ones(1)}))
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder, base_shape)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000
    assert caught.value.key is not None
    assert caught.value.key.isprintable()


# Pickled weights


def as_bin(folder: Path, content: Any = None) -> None:
    torch.save(load_file(folder / TENSORS) if content is None else content, folder / BIN)
    (folder / TENSORS).unlink()


def test_a_bin_is_refused_with_the_conversion_to_run(folder, base_shape):
    as_bin(folder)
    refused(folder, base_shape, r"adapter_model\.bin.*python -c .*save_file", BIN)


def test_the_conversion_that_the_refusal_names_works(folder, base_shape, monkeypatch):
    as_bin(folder)
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder, base_shape)
    monkeypatch.chdir(folder)
    exec(caught.value.message.split('python -c "')[1].rstrip('"'), {})
    assert read_adapter(folder, base_shape).rank == 4


def test_a_bin_reads_as_the_same_pairs_where_it_is_allowed(folder, base_shape):
    before = read_adapter(folder, base_shape)
    as_bin(folder)
    after = read_adapter(folder, base_shape, allow_bin=True)
    for one, other in zip(before.pairs, after.pairs, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
    summary = describe_adapter(folder)
    assert (summary.rank, summary.targets, summary.num_tensors) == (4, ("q_proj",), None)


def test_safetensors_are_preferred_to_a_bin(folder, base_shape):
    (folder / BIN).write_bytes(b"rubbish")
    assert read_adapter(folder, base_shape, allow_bin=True)


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(2)], "dictionary of tensors"),
        ({"a": 3}, "dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "dense tensor"),
        ({3: torch.ones(2)}, "not a string"),
        ({"a": Harmful()}, "corrupt"),
    ],
)
def test_a_bin_of_anything_but_tensors_is_refused(content, match, folder, base_shape):
    as_bin(folder, content)
    with pytest.raises(AdapterFileError, match=match):
        read_adapter(folder, base_shape, allow_bin=True)


def test_a_bin_that_is_no_archive_is_refused(folder, base_shape):
    (folder / TENSORS).unlink()
    (folder / BIN).write_bytes(b"\x80\x02}q\x00.")
    refused(folder, base_shape, "corrupt", BIN, allow_bin=True)


def test_a_bin_that_unpacks_to_too_much_is_refused(folder, base_shape, monkeypatch):
    (folder / TENSORS).unlink()
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 100_000)
    monkeypatch.setattr("loraplex.memory.tensor_file.BIN_MAX_BYTES", 50_000)
    refused(folder, base_shape, "unpacks to 100000 bytes; at most 50000", BIN, allow_bin=True)


# Identity


def test_comments_and_paths_leave_the_identity_as_it_is(folder, base_shape, edit_config):
    before = read_adapter(folder, base_shape).identity
    edit_config(folder, base_model_name_or_path="elsewhere", lora_dropout=0.7, comment="best run", inference_mode=False)
    assert read_adapter(folder, base_shape).identity == before
    assert len(bytes.fromhex(before)) == 32


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 6}}, {"rank_pattern": {".*": 4}}]
)
def test_what_matters_at_inference_changes_the_identity(change, folder, base_shape, edit_config):
    before = read_adapter(folder, base_shape).identity
    edit_config(folder, **change)
    assert read_adapter(folder, base_shape).identity != before


def test_the_order_of_patterns_changes_the_identity(folder, base_shape, edit_config):
    edit_config(folder, alpha_pattern={"q_proj": 6, ".*": 7})
    before = read_adapter(folder, base_shape).identity
    edit_config(folder, alpha_pattern={".*": 7, "q_proj": 6})
    assert read_adapter(folder, base_shape).identity != before


def test_one_bit_of_a_weight_changes_the_identity(folder, base_shape):
    before = read_adapter(folder, base_shape).identity
    data = bytearray((folder / TENSORS).read_bytes())
    data[-4] ^= 1
    (folder / TENSORS).write_bytes(data)
    assert read_adapter(folder, base_shape).identity != before


def test_the_tensors_outlive_the_file(folder, base_shape):
    spec = read_adapter(folder, base_shape)
    kept = spec.pairs[0].a.clone()
    (folder / TENSORS).write_bytes(b"\0" * (folder / TENSORS).stat().st_size)
    assert torch.equal(spec.pairs[0].a, kept)


# Listings


def test_the_description_says_what_the_files_say(save_peft, edit_config):
    folder, _ = save_peft(target_modules=LINEARS, rank_pattern={"v_proj": 9})
    edit_config(folder, base_model_name_or_path="org/base")
    summary = describe_adapter(folder)
    assert summary.rank == 9
    assert summary.targets == tuple(LINEARS)
    assert summary.num_tensors == 3 * 7 * 2
    assert summary.num_bytes == (folder / TENSORS).stat().st_size
    assert (summary.base_model, summary.dtype, summary.file) == ("org/base", "float32", TENSORS)


def test_mixed_dtypes_are_described_as_mixed(folder, edit_tensors):
    edit_tensors(folder, lambda tensors: tensors.update({k: v.half() for k, v in list(tensors.items())[:1]}))
    assert describe_adapter(folder).dtype == "mixed"


def test_adapters_are_found_by_name_in_order(folder, tmp_path):
    for name in ("zeta", "alpha", "müller v2.1"):
        shutil.copytree(folder, tmp_path / "many" / name)
    (tmp_path / "many" / "notes").mkdir()
    (tmp_path / "many" / "readme.txt").write_text("hello")
    found = find_adapters(tmp_path / "many")
    assert list(found.paths) == ["alpha", "müller v2.1", "zeta"]
    assert found.paths["zeta"] == tmp_path / "many" / "zeta"
    assert found.warnings == ()


def test_an_adapter_folder_itself_is_found_as_one(folder):
    assert find_adapters(folder).paths == {"adapter": folder}


@pytest.mark.parametrize("name", ["a,b", ".hidden", " padded", "bell\x07", "back\\slash", "new\nline", "\udcff"])
def test_folders_with_bad_names_are_skipped_with_a_warning(name, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "many" / name)
    shutil.copytree(folder, tmp_path / "many" / "good")
    found = find_adapters(tmp_path / "many")
    assert list(found.paths) == ["good"]
    assert len(found.warnings) == 1
    assert found.warnings[0].isprintable()


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="no such folder"):
        find_adapters(tmp_path / "nowhere")
