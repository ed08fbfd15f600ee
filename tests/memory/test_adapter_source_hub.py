"""The hub, by its own client against a stub of it on this machine, and by faults put in the client's place."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, errors, hf_hub_download

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_source import parse_source
from loraplex.memory.adapter_spec import BaseShape
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.source_hub import HubRemote
from loraplex.memory.source_reader import SourceReader
from loraplex.memory.source_remotes import Remotes

SOURCE = parse_source("hf://org/name@v1")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository: what the API tells of it, and its files at one commit."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        start = f"/org/name/resolve/{COMMIT}/"
        if path == "/api/models/org/name/revision/v1":
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": f"{hash(content)}"}
                for name, content in self.server.files.items()
            ]
            self._answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(start) and path.removeprefix(start) in self.server.files:
            self._answer(200, self.server.files[path.removeprefix(start)])
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub({path.name: path.read_bytes() for path in folder.iterdir()})
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def remote_of(hub: Hub) -> HubRemote:
    def fetch(*args: Any, **options: Any) -> object:
        return hf_hub_download(*args, **options, endpoint=hub.url)

    return HubRemote(api=HfApi(endpoint=hub.url), fetch=fetch)


def test_an_adapter_on_the_hub_is_read_as_the_same_adapter_as_its_folder(
    hub: Hub, tmp_path: Path, folder: Path, base_shape: BaseShape
) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 20, Remotes(hub=remote_of(hub)))
    reader = SourceReader(cache)
    spec = reader(SOURCE.url, base_shape)
    assert spec.identity == read_adapter(folder, base_shape).identity
    with reader.open(SOURCE.url) as cached:
        assert sorted(path.name for path in cached.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "entry.json",
        ]
    assert not any("README" in request for request in hub.requests)
    cache.check_integrity()


def test_a_commit_that_touches_other_files_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 20, Remotes(hub=remote_of(hub)), check_seconds=0)
    for readme in (b"one", b"two"):
        hub.files["README.md"] = readme
        with cache.open(SOURCE):
            pass
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


@pytest.mark.parametrize("path", ["hf://org/name@absent", "hf://org/absent@v1", "hf://org/absent"])
def test_what_is_not_on_the_hub_is_an_error_that_will_not_pass(hub: Hub, path: str) -> None:
    with pytest.raises(AdapterFileError, match=path) as caught:
        remote_of(hub).list_files(parse_source(path))
    assert not isinstance(caught.value, TransientReadError)


def failing(error: Exception) -> HubRemote:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return HubRemote(api=SimpleNamespace(model_info=fail), fetch=fail)  # type: ignore[arg-type]


def status_error(status: int) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub/x?signature=hunter2")
    return errors.HfHubHTTPError("hunter2", response=httpx2.Response(status, request=request))


def gated() -> Exception:
    request = httpx2.Request("GET", "https://hub/x")
    return errors.GatedRepoError("gated", response=httpx2.Response(403, request=request))


@pytest.mark.parametrize("error", [status_error(503), status_error(429), httpx2.ReadTimeout("x"), TimeoutError("x")])
def test_faults_of_the_hub_that_may_pass_are_transient(error: Exception) -> None:
    with pytest.raises(TransientReadError) as caught:
        failing(error).list_files(SOURCE)
    assert "hunter2" not in f"{caught.value.message}{caught.value.__cause__}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (status_error(401), "status 401"),
        (gated(), "HF_TOKEN"),
    ],
)
def test_refusals_of_the_hub_will_not_pass(error: Exception, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message) as caught:
        failing(error).list_files(SOURCE)
    assert not isinstance(caught.value, TransientReadError)


def test_offline_what_is_on_disk_is_served_and_the_rest_is_told_the_setting(hub: Hub, tmp_path: Path) -> None:
    with DiskCache(tmp_path / "cache", 1 << 20, remote_of(hub)).open(SOURCE) as folder:
        fetched = folder
    offline = failing(errors.OfflineModeIsEnabled("offline"))
    cache = DiskCache(tmp_path / "cache", 1 << 20, offline, check_seconds=0)
    with cache.open(SOURCE) as folder:
        assert folder == fetched
    for source in (parse_source("hf://org/other"), SOURCE):
        cache.expire(source)
        with pytest.raises(TransientReadError, match="HF_HUB_OFFLINE"), cache.open(source):
            pass


def test_a_full_disk_is_not_taken_for_a_fault_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    listing = remote_of(hub).list_files(SOURCE)
    with pytest.raises(OSError, match="No space"):
        failing(OSError(errno.ENOSPC, "No space left on device")).download(SOURCE, listing, tmp_path)
