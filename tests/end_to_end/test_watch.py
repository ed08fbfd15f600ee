"""A folder of adapters that changes while the real server follows it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.demo.assets import base_folder, demo_adapters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    shutil.copytree(demo_adapters()["reverse"], folder / "first")
    return folder


@pytest.fixture
def server(start_server: Callable[..., Any], folder: Path) -> Iterator[Any]:
    arguments = ("serve", str(base_folder()), "--adapters", str(folder), "--watch", "--watch-seconds", "0.1")
    server = start_server(*arguments).wait_until_ready()
    yield server
    assert server.stop() == 0


def publish(task: str, folder: Path) -> None:
    """As a careful publisher does: a whole folder at once."""
    fresh = folder.with_name(f".{folder.name}")
    shutil.copytree(demo_adapters()[task], fresh)
    if folder.exists():
        folder.rename(folder.with_name(f".old-{folder.name}"))
    fresh.rename(folder)


def eventually(condition: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + 20
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def card(server: Any, name: str) -> dict[str, Any]:
    return dict(server.get(f"/v1/adapters/{name}").json())


def test_adapters_come_change_break_and_go_with_their_folders(server: Any, folder: Path) -> None:
    assert server.ask("kernel", "first") == "lenrek"
    publish("spell", folder / "second")
    assert eventually(lambda: card(server, "second").get("state") == "registered")
    assert server.ask("kernel", "second") == "k-e-r-n-e-l"

    revision = card(server, "first")["revision"]
    publish("spell", folder / "first")
    assert eventually(lambda: card(server, "first")["revision"] > revision)
    assert server.ask("kernel", "first") == "k-e-r-n-e-l"

    weights = folder / "first" / "adapter_model.safetensors"
    broken = weights.with_name("broken")
    broken.write_bytes(weights.read_bytes()[:-64])
    broken.rename(weights)
    assert eventually(lambda: "what was registered stays" in server.log)
    assert server.ask("kernel", "first") == "k-e-r-n-e-l"

    shutil.rmtree(folder / "second")
    assert eventually(lambda: server.get("/v1/adapters/second").status_code == 404)
    folder.rename(folder.with_name("away"))
    assert eventually(lambda: "cannot be read; adapters stay" in server.log)
    assert server.ask("kernel", "first") == "k-e-r-n-e-l"
    folder.with_name("away").rename(folder)


def test_a_request_under_way_ends_on_the_content_it_began_with(server: Any, folder: Path) -> None:
    options: dict[str, Any] = {"adapter_id": "first", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with server.client() as client:
        before = client.generate("kernel", **options).text
        events = client.stream("kernel", **options)
        first = next(events)
        publish("spell", folder / "first")
        assert eventually(lambda: card(server, "first")["revision"] > 1)
        assert first.text + "".join(event.text for event in events) == before
        assert client.generate("kernel", **options).text != before
