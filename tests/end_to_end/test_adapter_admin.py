"""Registering, moving, pinning and finding adapters on the real server, and what of it a restart keeps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.clients.errors import BadRequest, Conflict
from loraplex.server.demo.assets import demo_adapters


@pytest.fixture
def kept(start_server: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts the demo with a state folder; the one before it must have ended."""
    servers: list[Any] = []

    def start(*arguments: str) -> Any:
        state = str(tmp_path / "state")
        servers.append(start_server("demo", "--state-dir", state, "--log-format", "json", *arguments))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        server.end()


def card(server: Any, name: str) -> dict[str, Any]:
    return dict(server.get(f"/v1/adapters/{name}").json())


def test_a_name_is_moved_pinned_found_and_forgotten(demo: Any, copy_adapter: Any) -> None:
    first, second = copy_adapter("reverse", "first").path, copy_adapter("spell", "second").path
    with demo.client() as client:
        client.load_adapter("moving", first, tags=["mine"])
        with pytest.raises(Conflict):
            client.load_adapter("moving", second)
        assert demo.ask("kernel", "moving") == "lenrek"
        moved = client.change_adapter("moving", path=second, pinned=True)
        assert (moved.pinned, moved.tags, moved.path) == (True, ("mine",), str(second))
        assert demo.ask("kernel", "moving") == "k-e-r-n-e-l"
        assert [one.name for one in client.list_adapters(tag="mine", tier="pool", pinned=True)] == ["moving"]
        client.unpin_adapter("moving")
        assert client.prefetch_adapter("moving").tier == "pool"
        client.unload_adapter("moving")
        assert list(client.list_adapters(prefix="moving")) == []


def test_two_names_of_the_same_bytes_are_one_adapter(demo: Any, copy_adapter: Any) -> None:
    path = copy_adapter("reverse").path
    with demo.client() as client:
        one, two = (client.load_adapter(name, path) for name in ("one", "two"))
        assert one.identity == two.identity
        client.unload_adapter("one")
        assert demo.ask("kernel", "two") == "lenrek"
        client.unload_adapter("two")


def test_pins_beyond_the_bound_are_refused(start_server: Callable[..., Any]) -> None:
    server = start_server("demo", "--max-pinned-fraction", "0").wait_until_ready()
    with server.client() as client, pytest.raises((BadRequest, Conflict)):
        client.pin_adapter("upper")
    assert card(server, "upper")["pinned"] is False
    assert server.ask("loraplex", "upper") == "LORAPLEX"
    server.stop()


def test_a_restart_keeps_what_came_over_http(kept: Any, copy_adapter: Any) -> None:
    path = copy_adapter("reverse").path
    server = kept()
    with server.client() as client:
        client.load_adapter("mine", path, tags=["a"], pinned=True)
        client.change_adapter("upper", tags=["b"])
        identity = client.get_adapter("mine").identity
    server.signal(signal.SIGKILL)
    server.wait()
    server = kept()
    mine = card(server, "mine")
    assert (mine["pinned"], mine["tags"], mine["identity"]) == (True, ["a"], identity)
    assert card(server, "upper")["tags"] == ["b"]
    assert server.ask("kernel", "mine") == "lenrek"
    assert server.stop() == 0


def test_a_new_engine_knows_the_registry(kept: Any, copy_adapter: Any) -> None:
    server = kept()
    with server.client(max_retries=20) as client:
        client.load_adapter("mine", copy_adapter("reverse").path, pinned=True)
        os.kill(server.engine_pid, signal.SIGKILL)
        answer = client.chat([{"role": "user", "content": "kernel"}], adapter_id="mine", temperature=0)
        assert answer.text == "lenrek"
        assert client.get_adapter("mine").tier == "pool"


def test_files_that_have_changed_since_they_were_read_are_noticed_after_a_restart(kept: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    server = kept()
    with server.client() as client:
        client.load_adapter("mine", folder.path)
    assert server.stop() == 0
    folder.become("spell")
    server = kept()
    messages = [{"role": "user", "content": "kernel"}]
    with server.client() as client:
        with pytest.raises(BadRequest, match="mine"):
            client.chat(messages, adapter_id="mine", temperature=0)
        assert client.get_adapter("mine").state == "failed"
        client.load_adapter("mine", folder.path, replace=True)
        assert client.chat(messages, adapter_id="mine", temperature=0).text == "k-e-r-n-e-l"


def test_a_state_folder_has_one_server(kept: Any, start_server: Callable[..., Any], tmp_path: Path) -> None:
    kept()
    second = start_server("demo", "--state-dir", str(tmp_path / "state"))
    assert second.wait() == 1
    assert "in use by another server" in second.log


def test_the_demo_registers_all_its_adapters(demo: Any) -> None:
    with demo.client() as client:
        assert {one.name for one in client.list_adapters()} >= set(demo_adapters())
