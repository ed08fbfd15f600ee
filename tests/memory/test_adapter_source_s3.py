"""Object stores against a real implementation of S3's protocol on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_source import parse_source
from loraplex.memory.adapter_spec import BaseShape
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.merge_recipe import MergeRecipe, MergeSource
from loraplex.memory.source_objects import ObjectStoreRemote
from loraplex.memory.source_reader import SourceReader
from loraplex.memory.source_remotes import Remotes

Bucket = dict[str, bytes]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> object:
    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    return client


def upload(client: object, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        client.put_object(Bucket="bucket", Key=f"{prefix}/{path.name}", Body=path.read_bytes())  # type: ignore[attr-defined]


def test_an_adapter_in_a_bucket_is_read_as_the_same_adapter_as_its_folder(
    client: object, tmp_path: Path, folder: Path, base_shape: BaseShape
) -> None:
    upload(client, folder, "team/ü =+@b/one")
    cache = DiskCache(tmp_path / "cache", 1 << 20, Remotes())
    reader = SourceReader(cache)
    spec = reader("s3://bucket/team/ü =+@b/one", base_shape)
    assert spec.identity == read_adapter(folder, base_shape).identity
    with reader.open("s3://bucket/team/ü =+@b/one") as cached:
        assert {path.name for path in cached.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "entry.json",
        }, "a readme and the like are not fetched"
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)
    cache.check_integrity()


def test_a_new_object_under_the_same_key_is_noticed(
    client: object, tmp_path: Path, folder: Path, base_shape: BaseShape
) -> None:
    upload(client, folder, "moved")
    cache = DiskCache(tmp_path / "cache", 1 << 20, Remotes(), check_seconds=0)
    reader = SourceReader(cache)
    before = reader("s3://bucket/moved", base_shape).identity
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    upload(client, folder, "moved")
    assert reader("s3://bucket/moved", base_shape).identity != before
    assert cache.stats().misses == 2


def test_a_merge_may_take_one_adapter_from_a_bucket_and_one_from_a_folder(
    client: object, tmp_path: Path, folder: Path, base_shape: BaseShape
) -> None:
    upload(client, folder, "one")
    reader = SourceReader(DiskCache(tmp_path / "cache", 1 << 20, Remotes()))

    def recipe(*paths: str) -> str:
        return MergeRecipe(tuple(MergeSource(path, 0, 0.5) for path in paths), "ties", 0.5).to_path()

    mixed = reader(recipe("s3://bucket/one", str(folder)), base_shape)
    assert mixed.identity == read_source(recipe(str(folder), str(folder)), base_shape).identity


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/absent", "no adapter here; expected adapter_config.json"),
        ("s3://absent-bucket/a", "no adapter here"),
        ("s3://bucket/only-config", "no adapter_model.safetensors here"),
        ("s3://bucket/pickled", "pickled weights are not read"),
    ],
)
def test_what_is_not_in_the_bucket_is_an_error_that_will_not_pass(client: object, path: str, message: str) -> None:
    for key in ("only-config/adapter_config.json", "pickled/adapter_config.json", "pickled/adapter_model.bin"):
        client.put_object(Bucket="bucket", Key=key, Body=b"{}")  # type: ignore[attr-defined]
    with pytest.raises(AdapterFileError, match=message) as caught:
        ObjectStoreRemote().list_files(parse_source(path))
    assert not isinstance(caught.value, TransientReadError)


def test_pickled_weights_are_fetched_where_they_are_allowed(client: object) -> None:
    for name in ("adapter_config.json", "adapter_model.bin"):
        client.put_object(Bucket="bucket", Key=f"bin/{name}", Body=b"{}")  # type: ignore[attr-defined]
    listing = ObjectStoreRemote(allow_bin=True).list_files(parse_source("s3://bucket/bin"))
    assert [file.name for file in listing.files] == ["adapter_config.json", "adapter_model.bin"]


def test_an_object_that_changes_between_listing_and_download_is_not_mixed(client: object, tmp_path: Path) -> None:
    put = client.put_object  # type: ignore[attr-defined]
    put(Bucket="bucket", Key="racy/adapter_config.json", Body=b"{}")
    put(Bucket="bucket", Key="racy/adapter_model.safetensors", Body=b"one")
    remote, source = ObjectStoreRemote(), parse_source("s3://bucket/racy")
    listing = remote.list_files(source)
    put(Bucket="bucket", Key="racy/adapter_model.safetensors", Body=b"two")
    with pytest.raises(TransientReadError, match=r"adapter_model\.safetensors changed while"):
        remote.download(source, listing, tmp_path)
