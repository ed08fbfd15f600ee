from __future__ import annotations

import time
from pathlib import Path

import pytest

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.adapter_spec import BaseShape
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.merge_recipe import MergeRecipe, MergeSource
from loraplex.memory.source_reader import SourceReader
from loraplex.memory.source_remote import RemoteFile, RemoteListing


class FolderRemote:
    """Any remote source is one local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0

    def list_files(self, source: AdapterSource) -> RemoteListing:
        self.asked += 1
        names = ("adapter_config.json", "adapter_model.safetensors")
        return RemoteListing(tuple(RemoteFile(name, (self.folder / name).stat().st_size, name) for name in names))

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        for file in listing.files:
            (folder / file.name).write_bytes((self.folder / file.name).read_bytes())


def recipe(*paths: str) -> str:
    return MergeRecipe(tuple(MergeSource(path, 0, 0.5) for path in paths), "ties", 0.5).to_path()


def test_a_folder_is_read_by_its_path_and_by_its_url(folder: Path, base_shape: BaseShape) -> None:
    expected = read_adapter(folder, base_shape).identity
    for path in (folder, str(folder), f"file://{folder}"):
        assert SourceReader()(path, base_shape).identity == expected


def test_a_merge_takes_adapters_from_anywhere(folder: Path, base_shape: BaseShape, tmp_path: Path) -> None:
    reader = SourceReader(DiskCache(tmp_path / "cache", 1 << 20, FolderRemote(folder)))
    expected = read_source(recipe(str(folder), str(folder)), base_shape).identity
    for path in (f"file://{folder}", "s3://bucket/a", "hf://org/name"):
        assert reader(recipe(str(folder), path), base_shape).identity == expected


def test_it_is_known_when_a_source_was_fetched(folder: Path, base_shape: BaseShape, tmp_path: Path) -> None:
    reader = SourceReader(DiskCache(tmp_path / "cache", 1 << 20, FolderRemote(folder)))
    before = time.monotonic()
    assert reader.last_fetch("s3://bucket/a") is None
    reader("s3://bucket/a", base_shape)
    began, ended = reader.last_fetch("s3://bucket/a") or (0.0, 0.0)
    assert before <= began <= ended <= time.monotonic()
    reader("s3://bucket/a", base_shape)
    assert reader.last_fetch("s3://bucket/a") == (began, ended), "it was there already"
    assert reader.last_fetch(str(folder)) is reader.last_fetch(recipe("s3://bucket/a", str(folder))) is None


def test_options_and_errors_are_those_of_the_reader_of_folders(folder: Path, base_shape: BaseShape) -> None:
    with pytest.raises(AdapterFileError, match="at most 10 are accepted"):
        SourceReader()(folder, base_shape, max_bytes=10)
    with pytest.raises(AdapterFileError, match="no such folder"):
        SourceReader()(f"{folder}-absent", base_shape)


def test_an_explicit_reload_asks_the_remotes_of_all_that_is_merged(
    folder: Path, base_shape: BaseShape, tmp_path: Path
) -> None:
    remote = FolderRemote(folder)
    reader = SourceReader(DiskCache(tmp_path / "cache", 1 << 20, remote))
    path = recipe("s3://bucket/a", str(folder), "hf://org/name")
    for _ in range(2):
        reader(path, base_shape)
    assert remote.asked == 2
    reader.expire(path)
    reader(path, base_shape)
    assert remote.asked == 4
    SourceReader().expire(path)
