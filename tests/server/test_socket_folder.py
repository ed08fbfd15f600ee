"""Folders of sockets that outlive their servers, and those that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.server import socket_folder
from loraplex.server.socket_folder import SocketFolder

OWNER = """
import sys
from pathlib import Path
from loraplex.server.socket_folder import SocketFolder
folder = SocketFolder(Path(sys.argv[1]))
(folder.path / "0-commands").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a folder at the same place."""
    arguments = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_its_users_alone_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = SocketFolder(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "owner").read_text() == f"{os.getpid()}\n"
    (folder.path / "0-commands").touch()
    folder.remove()
    assert not any(tmp_path.iterdir())


def test_the_folder_of_a_killed_server_goes_at_the_next_start_and_that_of_a_running_one_stays(
    tmp_path: Path, other: tuple[subprocess.Popen[str], Path]
) -> None:
    process, left = other
    one = SocketFolder(tmp_path)
    two = SocketFolder(tmp_path)
    assert {left, one.path, two.path} == set(tmp_path.iterdir())
    process.kill()
    process.wait()
    three = SocketFolder(tmp_path)
    assert {one.path, two.path, three.path} == set(tmp_path.iterdir())
    for folder in (one, two, three):
        folder.remove()


def test_what_may_be_somebody_elses_stays(
    tmp_path: Path, other: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, left = other
    process.kill()
    process.wait()
    elsewhere = tmp_path / "elsewhere"
    left.rename(elsewhere)
    (tmp_path / "loraplex-link").symlink_to(elsewhere)
    (tmp_path / "loraplex-new").mkdir()
    (tmp_path / "loraplex-file").touch()
    (tmp_path / "loraplex-linked-owner").mkdir()
    (tmp_path / "loraplex-linked-owner" / "owner").symlink_to(elsewhere / "owner")
    before = set(tmp_path.iterdir())
    SocketFolder(tmp_path).remove()
    assert set(tmp_path.iterdir()) == before
    assert (elsewhere / "0-commands").exists()

    elsewhere.rename(tmp_path / "loraplex-theirs")
    monkeypatch.setattr(socket_folder.os, "getuid", lambda: os.geteuid() + 1)
    SocketFolder(tmp_path).remove()
    assert (tmp_path / "loraplex-theirs" / "0-commands").exists()
