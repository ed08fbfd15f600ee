"""The disk cache under processes that share a folder and are killed in the middle of a download."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loraplex.memory.adapter_source import AdapterSource, parse_source
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.source_remote import RemoteFile, RemoteListing

TENSORS = "adapter_model.safetensors"
SIZE = 1000

PROGRAM = """
import sys
from pathlib import Path
from loraplex.memory.adapter_source import parse_source
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.source_remote import RemoteFile, RemoteListing

class Remote:
    def list_files(self, source):
        config = RemoteFile("adapter_config.json", 2, "c")
        return RemoteListing((config, RemoteFile("adapter_model.safetensors", 1000, "t")))

    def download(self, source, listing, folder):
        (folder / "adapter_config.json").write_bytes(b"{}")
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(b"x" * 500)
            file.flush()
            print("half", flush=True)
            sys.stdin.readline()
            file.write(b"x" * 500)

cache = DiskCache(Path(sys.argv[1]), 1500, Remote())
print("wants", flush=True)
with cache.open(parse_source("s3://bucket/a")) as folder:
    print("open", (folder / "adapter_model.safetensors").stat().st_size, flush=True)
    sys.stdin.readline()
"""

Start = Callable[[], "subprocess.Popen[str]"]


class Remote:
    """Counts downloads."""

    def __init__(self) -> None:
        self.downloaded: list[str] = []

    def list_files(self, source: AdapterSource) -> RemoteListing:
        return RemoteListing((RemoteFile("adapter_config.json", 2, "c"), RemoteFile(TENSORS, SIZE, "t")))

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        self.downloaded.append(source.url)
        (folder / "adapter_config.json").write_bytes(b"{}")
        (folder / TENSORS).write_bytes(b"x" * SIZE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that fetch an adapter, each waiting for a line in the middle and once it has it open."""
    started = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate(timeout=10)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_process_killed_in_the_middle_leaves_nothing_and_the_next_fetches_anew(tmp_path: Path, start: Start) -> None:
    process = start()
    assert [line_of(process), line_of(process)] == ["wants", "half"]
    beside = DiskCache(tmp_path / "cache", 1500, Remote())
    assert beside.stats().pending_bytes == SIZE + 2, "what another process fetches counts"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    cache = DiskCache(tmp_path / "cache", 1500, remote := Remote())
    assert not list((tmp_path / "cache/tmp").iterdir())
    assert (cache.stats().entries, cache.stats().pending_bytes) == (0, 0)
    with cache.open(parse_source("s3://bucket/a")) as folder:
        assert (folder / TENSORS).stat().st_size == SIZE
    assert len(remote.downloaded) == 1
    cache.check_integrity()
    # The cache that saw the other begin and not end makes room all the same.
    with beside.open(parse_source("s3://bucket/b")):
        beside.check_integrity()


def test_a_process_that_reads_keeps_its_adapter_from_others_until_it_is_killed(tmp_path: Path, start: Start) -> None:
    process = start()
    assert [line_of(process), line_of(process)] == ["wants", "half"]
    go_on(process)
    assert line_of(process) == f"open {SIZE}"
    cache = DiskCache(tmp_path / "cache", 1500, Remote())
    folder = next((tmp_path / "cache/entries").iterdir())
    with pytest.raises(Exception, match="no room"), cache.open(parse_source("s3://bucket/b")):
        pass
    assert (folder / TENSORS).exists()
    cache.check_integrity()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    with cache.open(parse_source("s3://bucket/b")):
        assert not folder.exists()
    cache.check_integrity()


def test_two_processes_that_want_one_adapter_fetch_it_once(start: Start) -> None:
    first = start()
    assert [line_of(first), line_of(first)] == ["wants", "half"]
    second = start()
    assert line_of(second) == "wants"
    go_on(first)
    assert line_of(first) == f"open {SIZE}"
    assert line_of(second) == f"open {SIZE}", "it waited, and did not fetch"


def test_a_waiting_process_takes_over_from_one_that_is_killed(start: Start) -> None:
    first = start()
    assert [line_of(first), line_of(first)] == ["wants", "half"]
    second = start()
    assert line_of(second) == "wants"
    os.kill(first.pid, signal.SIGKILL)
    assert line_of(second) == "half"
    go_on(second)
    assert line_of(second) == f"open {SIZE}"
