"""Adapters from an object store and uploads, on a disk that is too small, full, or whose remote is gone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx2
import pytest
from moto.server import ThreadedMotoServer

DISK_BYTES = 3 << 20
CACHE_BYTES = 500_000
"""Room for two of the larger adapters."""

TASKS = ("upper", "reverse", "spell", "devowel", "echo", "caesar")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of three MiB."""
    place = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class Remote:
    """A real implementation of S3's protocol, which can go away and come back under the same address."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint, self._port = f"http://{host}:{port}", port
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        self.make_bucket()

    @property
    def client(self) -> Any:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def make_bucket(self) -> None:
        self.client.create_bucket(Bucket="bucket")

    def put(self, folder: Path, name: str) -> None:
        for path in folder.iterdir():
            self.client.put_object(Bucket="bucket", Key=f"team/{name}/{path.name}", Body=path.read_bytes())

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    remote = Remote()
    yield remote
    remote.stop()


@pytest.fixture(scope="module")
def names(remote: Remote, folders: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of adapters in the bucket."""
    root = tmp_path_factory.mktemp("remote")
    found = []
    for number in range(2):
        for task in TASKS:
            name = f"{task}-{number}"
            remote.put(folders.copy_adapter(task, root / name, 80 + number), name)
            found.append(name)
    return found


@pytest.fixture(scope="module")
def doomed(start_small: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose cache is to be where a file lies; it has just been started."""
    place = tmp_path_factory.mktemp("doomed") / "cache"
    place.write_text("a file")
    return start_small(None, "--cache-dir", str(place))


@pytest.fixture(scope="module")
def server(
    start_small: Callable[..., Any], doomed: Any, small_disk: Path, remote: Remote, names: list[str]
) -> Iterator[Any]:
    """Serves the bucket through a cache for two adapters, and keeps its cache and its state on the small disk."""
    folders = ("--cache-dir", str(small_disk / "cache"), "--state-dir", str(small_disk / "state"))
    limits = ("--disk-cache-bytes", str(CACHE_BYTES), "--adapter-sources", "s3://bucket/team/")
    server = start_small(None, *folders, *limits, env=remote.environment).wait_until_ready()
    for name in names:
        answer = server.post("/v1/adapters", {"id": name, "path": f"s3://bucket/team/{name}"})
        assert answer.status_code == 200, answer.text
    yield server
    assert server.stop() == 0, server.log[-4000:]


class Filler:
    """A file that takes all that is left of a disk."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / "filler"

    def __enter__(self) -> Filler:
        with self._file.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink()


def ask(load: Any, server: Any, name: str) -> Any:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        return load.ask(client, name, "kernel")


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.is_file())


def test_twelve_adapters_are_served_through_a_disk_cache_for_two(
    load: Any, server: Any, names: list[str], small_disk: Path
) -> None:
    with load.Load(server, [*names, None], clients=6) as running:
        running.wait_for_answers(40, seconds=120)
    assert not running.failures, running.failures[:3]
    assert bytes_below(small_disk / "cache") <= CACHE_BYTES
    metrics = server.metrics()
    assert metrics.value("loraplex_tier_bytes", tier="disk") <= metrics.value("loraplex_tier_limit_bytes", tier="disk")
    assert metrics.value("loraplex_adapter_evictions_total", tier="disk") > 0


def test_an_adapter_larger_than_the_disk_cache_is_refused_while_others_go_on(
    load: Any, server: Any, remote: Remote, folders: Any, tmp_path: Path
) -> None:
    remote.put(folders.copy_adapter("sort", tmp_path / "sort", 90), "large")
    with load.Load(server, ("upper-0", "spell-0", None), clients=2) as running:
        refused = server.post("/v1/adapters", {"id": "large", "path": "s3://bucket/team/large"})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["code"] == "adapter_too_large"
        assert "disk_cache_bytes" in refused.json()["error"]["message"]
        running.wait_for_answers(2)
    assert not running.failures


def test_a_full_disk_is_an_error_of_what_does_not_fit_until_there_is_room(
    load: Any,
    server: Any,
    remote: Remote,
    small_disk: Path,
    folders: Any,
    tmp_path: Path,
    wait_until: Callable[..., bool],
) -> None:
    warm = "upper-0"
    fresh = folders.copy_adapter("reverse", tmp_path / "fresh", 91)
    remote.put(fresh, "fresh")
    assert ask(load, server, warm).is_right
    with load.Load(server, (warm, None), clients=2) as running:
        with Filler(small_disk):
            before = sorted(path.name for path in (small_disk / "state" / "adapters").iterdir())
            with server.client() as client, pytest.raises(Exception, match="disk of 'state_dir'") as caught:
                client.upload_adapter("sent", fresh)
            assert caught.value.status == 507
            assert sorted(path.name for path in (small_disk / "state" / "adapters").iterdir()) == before
            assert not any((small_disk / "state" / "staging").iterdir())
            changed = server.request("PATCH", f"/v1/adapters/{warm}", json={"tags": ["full"]})
            assert (changed.status_code, changed.json()["error"]["code"]) == (503, "not_saved")
            running.wait_for_answers(2)
        with server.client() as client:
            client.upload_adapter("sent", fresh)
        assert server.request("PATCH", f"/v1/adapters/{warm}", json={"tags": ["room"]}).status_code == 200
        running.wait_for_answers(2)
    assert not running.failures, running.failures[:3]
    assert server.ask("kernel", "sent") == "lenrek"
    assert server.request("DELETE", "/v1/adapters/sent").status_code == 200


def test_a_cache_on_a_full_disk_makes_do_with_the_room_of_its_own_adapters_and_recovers(
    load: Any, server: Any, names: list[str], small_disk: Path, wait_until: Callable[..., bool]
) -> None:
    with Filler(small_disk):
        seen = [ask(load, server, name) for name in names]
    assert any(one.is_right for one in seen)
    for one in seen:
        if one.failure is None:
            assert one.is_right
        else:
            assert f"'{one.adapter}'" in one.failure.message
            assert "no room on this disk" in one.failure.message
    for name in names:
        assert wait_until(lambda name=name: ask(load, server, name).is_right, 60), name
    assert bytes_below(small_disk / "cache") <= CACHE_BYTES


def test_while_the_remote_is_gone_what_is_here_is_served_and_the_rest_is_told_so(
    load: Any, server: Any, remote: Remote, names: list[str], wait_until: Callable[..., bool]
) -> None:
    assert ask(load, server, names[0]).is_right
    remote.stop()
    try:
        seen = [ask(load, server, name) for name in names]
    finally:
        remote.start()
    assert any(one.is_right for one in seen)
    assert any(one.failure is not None for one in seen)
    for one in seen:
        if one.failure is None:
            assert one.is_right
        else:
            assert (one.failure.status, one.failure.code) == (503, "adapter_unavailable")
            assert f"'{one.adapter}'" in one.failure.message
    assert server.get("/health").status_code == 200
    for one in seen:
        if one.failure is not None:
            assert wait_until(lambda name=one.adapter: ask(load, server, name).is_right, 60), one.adapter


def test_a_cache_folder_that_cannot_be_one_ends_the_start_with_the_name_of_its_setting(doomed: Any) -> None:
    assert doomed.wait(120) != 0
    assert "cache_dir" in doomed.log
    assert "Traceback" not in doomed.log
