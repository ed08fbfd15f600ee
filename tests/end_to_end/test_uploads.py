"""Adapters sent to the real server over HTTP."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.clients.errors import BadRequest, Conflict


@pytest.fixture
def start(start_server: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Starts the demo with a state folder."""
    return lambda *more: start_server("demo", "--state-dir", str(tmp_path / "state"), *more).wait_until_ready()


def files_of(server_state: Path) -> list[str]:
    return sorted(path.name for path in (server_state / "adapters").iterdir())


def test_an_uploaded_adapter_is_served_and_survives_a_kill(start: Any, copy_adapter: Any, tmp_path: Path) -> None:
    folder = copy_adapter("reverse").path
    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", folder)
    server = start()
    with server.client() as client:
        sent = client.upload_adapter("mine", folder, tags=["a"])
        packed = client.upload_adapter("packed", archive)
        assert sent.identity == packed.identity
        assert sent.path == packed.path
    shutil.rmtree(folder)
    assert server.ask("kernel", "mine") == "lenrek"
    server.signal(signal.SIGKILL)
    server.wait()
    server = start()
    assert server.ask("kernel", "mine") == server.ask("kernel", "packed") == "lenrek"
    with server.client() as client:
        assert client.get_adapter("mine").tags == ("a",)
        client.unload_adapter("mine")
        assert server.ask("kernel", "packed") == "lenrek"
    assert server.stop() == 0


def test_a_broken_upload_is_refused_and_leaves_nothing(start: Any, copy_adapter: Any, tmp_path: Path) -> None:
    server = start()
    folder = copy_adapter("reverse").path
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with server.client() as client:
        with pytest.raises(BadRequest):
            client.upload_adapter("mine", folder)
        assert files_of(tmp_path / "state") == []
        weights.write_bytes(whole)
        client.upload_adapter("mine", folder)
        with pytest.raises(Conflict):
            client.upload_adapter("mine", copy_adapter("spell", "other").path)
        client.upload_adapter("mine", copy_adapter("spell", "another").path, replace=True)
    assert server.ask("kernel", "mine") == "k-e-r-n-e-l"
    assert server.stop() == 0


def test_a_server_without_a_state_folder_names_the_setting(demo: Any, copy_adapter: Any) -> None:
    with demo.client() as client, pytest.raises(BadRequest, match="'state_dir'"):
        client.upload_adapter("mine", copy_adapter("reverse").path)
