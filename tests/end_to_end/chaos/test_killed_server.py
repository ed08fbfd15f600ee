"""The whole server is killed with -9: what it had confirmed is there again, and what was half-written is not."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil


def send_half_an_upload(url: str, folder: Path) -> socket.socket:
    """A connection over which an upload has begun and never ends."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    part = 'Content-Disposition: form-data; name="adapter_model.safetensors"; filename="adapter_model.safetensors"'
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-length: {4 * len(weights)}\r\n"
        f"content-type: multipart/form-data; boundary=half\r\n\r\n--half\r\n{part}\r\n\r\n"
    )
    connection.sendall(head.encode() + weights)
    return connection


class Tagger:
    """Gives an adapter one tag after another until it cannot any more; ``confirmed`` is the last that it has."""

    def __init__(self, server: Any, name: str) -> None:
        self.confirmed = -1
        self._url = f"{server.url}/v1/adapters/{name}"
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Tagger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        for number in itertools.count():
            try:
                if httpx2.patch(self._url, json={"tags": [f"turn-{number}"]}, timeout=60).status_code != 200:
                    return
            except httpx2.HTTPError:
                return
            self.confirmed = number


def test_a_killed_server_comes_back_with_all_that_it_had_confirmed(
    chaos: Any,
    chaos_server: Any,
    load: Any,
    adapters: Any,
    folders: Any,
    tmp_path: Path,
    wait_until: Callable[..., bool],
) -> None:
    server, state = chaos, chaos_server.state
    by_path = folders.copy_adapter("reverse", tmp_path / "by-path", 70)
    sent = folders.copy_adapter("spell", tmp_path / "sent", 71)
    with server.client() as client:
        client.load_adapter("reverse-path", str(by_path))
        client.upload_adapter("spell-sent", sent, tags=["kept"], pinned=True)
        client.upload_adapter("spell-gone", folders.copy_adapter("spell", tmp_path / "gone", 72))
        client.unload_adapter("spell-gone")
    shutil.rmtree(sent)
    assert server.post("/v1/adapters/upper-00/pin", {}).status_code == 200
    assert server.ask("kernel", "caesar-00") == "nhuqho"
    identity = server.get("/v1/adapters/spell-sent").json()["identity"]
    engine = server.engine_pid
    half = send_half_an_upload(server.url, by_path)
    assert wait_until(lambda: any((state / "staging").iterdir()))
    with Tagger(server, "reverse-path") as tagger:
        assert wait_until(lambda: tagger.confirmed >= 3)
        server.signal(signal.SIGKILL)
        server.wait()
    half.close()
    (state / "registry.json.tmp").write_bytes(b'{"version": 1, "adap')
    assert wait_until(lambda: not psutil.pid_exists(engine)), "the engine outlives its server"

    shutil.rmtree(by_path)
    folders.copy_adapter("echo", by_path, 73)
    server = chaos_server.ready()
    assert not any((state / "staging").iterdir())
    assert len(list((state / "adapters").iterdir())) == 1
    with server.client() as client:
        card = client.get_adapter("spell-sent")
        assert card.tags == ("kept",)
        assert card.identity == identity
        again = client.get_adapter("reverse-path")
        assert again.tags in {(f"turn-{tagger.confirmed}",), (f"turn-{tagger.confirmed + 1}",)}
    assert server.get("/v1/adapters/spell-gone").status_code == 404
    assert server.get("/v1/adapters/upper-00").json()["pinned"]
    for pinned in ("upper-00", "spell-sent"):
        assert wait_until(lambda pinned=pinned: server.get(f"/v1/adapters/{pinned}").json()["tier"] == "pool")
    assert server.ask("kernel", "spell-sent") == "k-e-r-n-e-l"
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        refused = load.ask(client, "reverse-path", "kernel").failure
    assert refused is not None
    assert "changed" in refused.message
    for name in ("spell-sent", "reverse-path"):
        assert server.request("DELETE", f"/v1/adapters/{name}").status_code == 200
    assert server.post("/v1/adapters/upper-00/unpin", {}).status_code == 200
    assert wait_until(lambda: not any((state / "adapters").iterdir()))
    assert {path.name for path in state.iterdir()} == {"registry.json", "lock", "adapters", "staging"}
