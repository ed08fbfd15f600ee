"""Object stores that are slow, refuse, break off or lie, and no store at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loraplex.memory import source_objects
from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_source import parse_source
from loraplex.memory.adapter_spec import BaseShape
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.source_objects import ObjectStoreRemote
from loraplex.memory.source_reader import SourceReader

CONFIG, TENSORS = b"{}", b"t" * 50_000
SOURCE = parse_source("s3://bucket/a")
SECRET = "hunter2"


class Store(ThreadingHTTPServer):
    """Answers as S3 does, until told to fail.

    Attributes:
        head_status, get_status: of answers.
        fault: what happens to the content: "cut" closes early, "short" and "long" are of another size than listed,
            "stall" sends nothing after the headers.
    """

    daemon_threads = True
    head_status = get_status = 200
    fault = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.released = threading.Event()
        self.requests: list[str] = []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_HEAD(self) -> None:
        self._begin(self.server.head_status, len(self._content()))

    def do_GET(self) -> None:
        content, fault = self._content(), self.server.fault
        if self.server.get_status != 200:
            body = f"<Error><AWSAccessKeyId>{SECRET}</AWSAccessKeyId></Error>".encode()
            self._begin(self.server.get_status, len(body))
            self.wfile.write(body)
            return
        if fault in ("short", "long"):
            content = content[:-1] if fault == "short" else content + b"x"
        self._begin(200, len(content))
        if fault == "stall":
            self.server.released.wait(10)
        elif fault == "cut":
            self.wfile.write(content[:-1])
        else:
            self.wfile.write(content)
        self.close_connection = bool(fault)

    def _content(self) -> bytes:
        return CONFIG if self.path.endswith("json") else TENSORS

    def _begin(self, status: int, size: int) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"tag"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server_port}",
        "AWS_ACCESS_KEY_ID": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    yield store
    store.released.set()
    store.shutdown()
    thread.join()
    store.server_close()


def fetch(folder: Path, seconds: float = 10.0) -> None:
    cache = DiskCache(folder / "cache", 1 << 20, ObjectStoreRemote(timeout_seconds=seconds))
    try:
        with cache.open(SOURCE):
            pass
    finally:
        cache.check_integrity()
        assert not list((folder / "cache/tmp").iterdir())


def test_a_sound_store_is_asked_twice_and_read_twice(store: Store, tmp_path: Path) -> None:
    fetch(tmp_path)
    paths = [f"/bucket/a/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert store.requests == [f"{verb} {path}" for verb in ("HEAD", "GET") for path in paths]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
@pytest.mark.parametrize("verb", ["head_status", "get_status"])
def test_a_status_that_may_pass_is_transient_and_not_tried_again_at_once(
    store: Store, tmp_path: Path, verb: str, status: int
) -> None:
    setattr(store, verb, status)
    with pytest.raises(TransientReadError, match=f"adapter_config.json cannot be read.*{status}") as caught:
        fetch(tmp_path)
    assert SECRET not in f"{caught.value.message}{caught.value.__cause__}"
    assert len(store.requests) == (1 if verb == "head_status" else 3)


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize("verb", ["head_status", "get_status"])
def test_a_refusal_will_not_pass_and_shows_no_credentials(store: Store, tmp_path: Path, verb: str, status: int) -> None:
    setattr(store, verb, status)
    with pytest.raises(AdapterFileError, match=r"denied|status 400") as caught:
        fetch(tmp_path)
    assert not isinstance(caught.value, TransientReadError)
    assert SECRET not in f"{caught.value.message}{caught.value.__cause__}"


@pytest.mark.parametrize("fault", ["cut", "short", "long"])
def test_content_of_another_length_is_not_kept(store: Store, tmp_path: Path, fault: str) -> None:
    store.fault = fault
    with pytest.raises(TransientReadError, match=r"adapter_config\.json"):
        fetch(tmp_path)
    store.fault = ""
    fetch(tmp_path)


def test_a_store_that_stalls_fails_after_the_timeout(store: Store, tmp_path: Path) -> None:
    store.fault = "stall"
    with pytest.raises(TransientReadError, match=r"adapter_config\.json"):
        fetch(tmp_path, seconds=0.2)


def test_no_connection_is_transient(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(TransientReadError, match="no connection to the store"):
        fetch(tmp_path)


def test_an_object_that_is_gone_once_it_was_listed_is_transient(store: Store, tmp_path: Path) -> None:
    store.get_status = 404
    with pytest.raises(TransientReadError, match="went away"):
        fetch(tmp_path)


def test_a_configuration_of_absurd_size_is_not_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "_content", lambda self: b"x" * (5 << 20))
    with pytest.raises(AdapterFileError, match="at most"):
        ObjectStoreRemote().list_files(SOURCE)


def test_one_client_serves_all_adapters_of_a_bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = ObjectStoreRemote._make
    monkeypatch.setattr(ObjectStoreRemote, "_make", lambda self, source: made.append(source) or make(self, source))
    remote = ObjectStoreRemote()
    for name in "abc":
        remote.list_files(parse_source(f"s3://bucket/{name}"))
    assert len(made) == 1


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_objects, "HAS_OBSTORE", False)
    with pytest.raises(AdapterFileError, match=r"loraplex\[remote\]"):
        ObjectStoreRemote().list_files(SOURCE)


def test_azure_without_an_account_says_that_the_environment_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(AdapterFileError, match="environment"):
        ObjectStoreRemote().list_files(parse_source("az://container/a"))


def test_without_a_cache_remote_adapters_are_refused_with_the_setting(base_shape: BaseShape) -> None:
    with pytest.raises(AdapterFileError, match="set cache_dir"):
        SourceReader()("s3://bucket/a", base_shape)
