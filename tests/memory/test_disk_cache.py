from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.memory import disk_folder
from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_source import AdapterSource, parse_source
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.eviction_order import LruOrder
from loraplex.memory.source_remote import RemoteFile, RemoteListing

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class FakeRemote:
    """Adapters by url, as (marker, bytes); counts what is asked of it."""

    def __init__(self) -> None:
        self.adapters: dict[str, tuple[int, int]] = {}
        self.seconds: dict[str, float] = {}
        self.fault: Exception | None = None
        self.write_faults: list[Exception] = []
        self.now = 0.0
        self.listed: list[str] = []
        self.downloaded: list[str] = []
        self.on_download: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def list_files(self, source: AdapterSource) -> RemoteListing:
        self.listed.append(source.url)
        if self.fault is not None:
            raise self.fault
        if source.url not in self.adapters:
            raise AdapterFileError(f"{source.url}: no adapter here")
        marker, size = self.adapters[source.url]
        return RemoteListing((RemoteFile(CONFIG, 2, "c"), RemoteFile(TENSORS, size - 2, f'"{marker}"')))

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        self.downloaded.append(source.url)
        (folder / CONFIG).write_bytes(b"{}")
        self.on_download()
        if self.write_faults:
            raise self.write_faults.pop(0)
        marker, size = self.adapters[source.url]
        (folder / TENSORS).write_bytes(bytes([marker]) * (size - 2))
        self.now += self.seconds.get(source.url, 1.0)


def source(name: str) -> AdapterSource:
    return parse_source(f"s3://bucket/{name}")


def make(root: Path, remote: FakeRemote, limit: int = 1000, **options: Any) -> DiskCache:
    return DiskCache(root / "cache", limit, remote, clock=remote.clock, **options)


def content(folder: Path) -> tuple[int, int]:
    data = (folder / TENSORS).read_bytes()
    assert set(data) <= {data[0]}
    return data[0], len(data) + 2


def read(cache: DiskCache, name: str) -> tuple[int, int]:
    with cache.open(source(name)) as folder:
        return content(folder)


def on_disk(root: Path) -> int:
    """Bytes of adapters' files anywhere below the cache's folder."""
    return sum(path.stat().st_size for path in root.rglob("adapter_*") if path.is_file())


@pytest.fixture
def remote() -> FakeRemote:
    remote = FakeRemote()
    remote.adapters = {f"s3://bucket/{name}": (ord(name), 300) for name in "abcdefgh"}
    return remote


def test_an_adapter_is_fetched_once_and_served_from_the_disk_afterwards(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    assert [read(cache, "a") for _ in range(3)] == [(ord("a"), 300)] * 3
    stats = cache.stats()
    assert (remote.downloaded, len(remote.listed)) == (["s3://bucket/a"], 1)
    assert (stats.hits, stats.misses, stats.entries, stats.num_bytes, stats.pending_bytes) == (2, 1, 1, 300, 0)
    assert (cache.take_recent(), cache.take_recent()) == ([1.0], [])
    cache.check_integrity()


def test_a_local_folder_is_given_as_it_is(tmp_path: Path, remote: FakeRemote) -> None:
    with make(tmp_path, remote).open(parse_source("/some/folder")) as folder:
        assert folder == Path("/some/folder")
    assert not remote.listed


def test_the_remote_is_asked_again_after_a_while_and_a_new_version_replaces_the_old(
    tmp_path: Path, remote: FakeRemote
) -> None:
    cache = make(tmp_path, remote, check_seconds=10)
    read(cache, "a")
    remote.adapters["s3://bucket/a"] = (200, 400)
    remote.now += 5
    assert read(cache, "a") == (ord("a"), 300)
    remote.now += 5
    assert read(cache, "a") == (200, 400)
    cache.check_integrity()
    assert cache.stats().evictions == {}
    [read(cache, name) for name in "bc"]
    assert cache.stats().evictions == {"replaced": 1}, "the old version goes before anything else"


def test_a_commit_that_changes_no_file_of_the_adapter_fetches_nothing(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, check_seconds=0)
    assert [read(cache, "a") for _ in range(3)] == [(ord("a"), 300)] * 3
    assert (len(remote.listed), len(remote.downloaded)) == (3, 1)


def test_an_open_version_stays_while_a_newer_one_is_fetched(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, check_seconds=0)
    with cache.open(source("a")) as old:
        remote.adapters["s3://bucket/a"] = (200, 400)
        assert read(cache, "a") == (200, 400)
        assert content(old) == (ord("a"), 300)
        cache.check_integrity()
    read(cache, "b")
    read(cache, "c")
    assert not old.exists()
    cache.check_integrity()


def test_an_expired_source_is_asked_for_at_once(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    read(cache, "a")
    remote.adapters["s3://bucket/a"] = (200, 300)
    cache.expire(source("a"))
    assert read(cache, "a") == (200, 300)


def test_what_is_here_is_served_while_the_remote_is_away_unless_a_reload_was_asked_for(
    tmp_path: Path, remote: FakeRemote, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(tmp_path, remote, check_seconds=10)
    read(cache, "a")
    remote.now += 20
    remote.fault = TransientReadError("no connection")
    with caplog.at_level(logging.WARNING):
        assert read(cache, "a") == (ord("a"), 300)
    assert "no connection" in caplog.text
    asked = len(remote.listed)
    read(cache, "a")
    assert len(remote.listed) == asked, "a remote that is away is not asked each time"
    with pytest.raises(TransientReadError):
        read(cache, "b")
    cache.expire(source("a"))
    with pytest.raises(TransientReadError):
        read(cache, "a")
    remote.fault = None
    assert read(cache, "a") == (ord("a"), 300)


def test_an_outage_is_met_once_per_bucket_and_for_some_seconds_nothing_that_is_here_asks_again(
    tmp_path: Path, remote: FakeRemote
) -> None:
    remote.adapters["s3://other/a"] = (1, 100)
    cache = make(tmp_path, remote, check_seconds=10)
    [read(cache, name) for name in "abc"]
    with cache.open(parse_source("s3://other/a")):
        pass
    remote.now += 20
    remote.fault = TransientReadError("no connection")
    remote.listed.clear()
    for _ in range(2):
        assert [read(cache, name)[0] for name in "abc"] == [ord(name) for name in "abc"]
    assert remote.listed == ["s3://bucket/a"]
    with cache.open(parse_source("s3://other/a")):
        assert remote.listed[1:] == ["s3://other/a"], "another bucket may be within reach"
    with pytest.raises(TransientReadError):
        read(cache, "d")
    remote.now += 31
    remote.listed.clear()
    assert read(cache, "b") == (ord("b"), 300)
    assert remote.listed == ["s3://bucket/b"]


def test_an_outage_met_by_what_is_not_here_is_known_to_what_is_and_ends_with_an_answer(
    tmp_path: Path, remote: FakeRemote
) -> None:
    cache = make(tmp_path, remote, check_seconds=10)
    [read(cache, name) for name in "ab"]
    remote.now += 20
    remote.fault = TransientReadError("no connection")
    with pytest.raises(TransientReadError):
        read(cache, "c")
    remote.listed.clear()
    read(cache, "a")
    assert not remote.listed
    remote.fault = None
    remote.adapters["s3://bucket/a"] = (200, 300)
    read(cache, "c")
    assert read(cache, "a") == (200, 300), "whoever answers again is asked again"


@pytest.mark.parametrize("check_seconds", [10.0, math.inf])
def test_a_reload_from_a_remote_that_is_away_fails_however_lately_that_was_found_out(
    tmp_path: Path, remote: FakeRemote, check_seconds: float
) -> None:
    cache = make(tmp_path, remote, check_seconds=check_seconds)
    [read(cache, name) for name in "ab"]
    remote.now += 20
    remote.fault = TransientReadError("no connection")
    read(cache, "a")
    cache.expire(source("b"))
    for _ in range(2):
        with pytest.raises(TransientReadError):
            read(cache, "b")
    assert read(cache, "a") == (ord("a"), 300)
    remote.fault = None
    assert read(cache, "b") == (ord("b"), 300)


def test_who_never_asks_again_serves_what_a_restart_finds_without_a_remote(tmp_path: Path, remote: FakeRemote) -> None:
    read(make(tmp_path, remote), "a")
    remote.now += 1e9
    remote.fault = TransientReadError("no connection")
    remote.listed.clear()
    assert read(make(tmp_path, remote, check_seconds=math.inf), "a") == (ord("a"), 300)
    assert not remote.listed


def test_an_error_that_will_not_pass_is_no_outage(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, check_seconds=0)
    [read(cache, name) for name in "ab"]
    remote.fault = AdapterFileError("no permission")
    for name in "abb":
        with pytest.raises(AdapterFileError, match="no permission"):
            read(cache, name)


def test_the_adapter_worth_least_for_its_bytes_goes_first(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    remote.seconds = {"s3://bucket/a": 60.0, "s3://bucket/b": 1.0, "s3://bucket/c": 30.0}
    [read(cache, name) for name in "abcd"]
    assert cache.stats().evictions == {"room": 1}
    remote.downloaded.clear()
    [read(cache, name) for name in "acd"]
    assert not remote.downloaded, "b was the quickest to fetch"


def test_the_lru_twin_evicts_what_was_used_longest_ago(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, order=LruOrder())
    remote.seconds = {"s3://bucket/a": 60.0}
    [read(cache, name) for name in "abcd"]
    remote.downloaded.clear()
    [read(cache, name) for name in "bcd"]
    assert not remote.downloaded


def test_the_budget_is_never_exceeded_while_fetching(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, 700)
    seen = []
    remote.on_download = lambda: seen.append(on_disk(tmp_path))
    for name in "abcdefgh" * 2:
        read(cache, name)
        assert on_disk(tmp_path) <= 700
    assert max(seen) <= 700
    cache.check_integrity()


def test_an_adapter_larger_than_the_budget_is_refused_without_being_fetched(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, 299)
    with pytest.raises(AdapterFileError, match="300 bytes; the disk cache holds at most 299") as caught:
        read(cache, "a")
    assert caught.value.key == "bytes"
    assert not isinstance(caught.value, TransientReadError)
    assert not remote.downloaded


def test_open_adapters_are_not_evicted_and_leave_no_room_only_for_a_while(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote, 700)
    with cache.open(source("a")) as first, cache.open(source("b")) as second:
        with pytest.raises(TransientReadError, match="no room in the disk cache"):
            read(cache, "c")
        assert (content(first), content(second)) == ((ord("a"), 300), (ord("b"), 300))
        cache.check_integrity()
    assert read(cache, "c") == (ord("c"), 300)


def test_a_failed_download_leaves_nothing_and_the_next_succeeds(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    remote.write_faults = [TransientReadError("the line went dead")]
    with pytest.raises(TransientReadError, match="dead"):
        read(cache, "a")
    assert (on_disk(tmp_path), cache.stats().pending_bytes) == (0, 0)
    cache.check_integrity()
    assert read(cache, "a") == (ord("a"), 300)


def test_files_of_another_size_than_listed_are_not_kept(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    remote.on_download = lambda: remote.adapters.update({"s3://bucket/a": (1, 299)})
    with pytest.raises(TransientReadError, match="not what was listed"):
        read(cache, "a")
    assert on_disk(tmp_path) == 0
    cache.check_integrity()


def test_on_a_full_disk_others_go_and_the_download_is_tried_once_more(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    read(cache, "a")
    remote.write_faults = [OSError(errno.ENOSPC, "No space left on device")]
    assert read(cache, "b") == (ord("b"), 300)
    assert cache.stats().evictions == {"disk_full": 1}
    cache.check_integrity()


def test_a_disk_that_stays_full_is_told_with_the_folder_and_the_setting(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    remote.write_faults = [OSError(errno.ENOSPC, "No space left on device")] * 2
    with pytest.raises(AdapterFileError, match=f"{tmp_path}/cache: no room.*disk_cache_bytes.*cache_dir") as caught:
        read(cache, "a")
    assert not isinstance(caught.value, TransientReadError)
    assert on_disk(tmp_path) == 0
    assert read(cache, "a") == (ord("a"), 300)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_told_with_the_setting(
    tmp_path: Path, remote: FakeRemote, number: int
) -> None:
    cache = make(tmp_path, remote)
    remote.write_faults = [OSError(number, os.strerror(number))]
    with pytest.raises(AdapterFileError, match=f"{os.strerror(number)}; cache_dir must be"):
        read(cache, "a")
    assert on_disk(tmp_path) == 0


def test_a_root_that_is_a_file_is_refused_at_the_start(tmp_path: Path, remote: FakeRemote) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(AdapterFileError, match="cache_dir") as caught:
        make(tmp_path, remote)
    assert caught.value.key == "cache_dir"


@pytest.mark.parametrize("damage", ["truncate", "delete", "delete_folder"])
def test_files_that_are_not_as_recorded_are_fetched_again(tmp_path: Path, remote: FakeRemote, damage: str) -> None:
    cache = make(tmp_path, remote)
    with cache.open(source("a")) as folder:
        pass
    if damage == "truncate":
        os.truncate(folder / TENSORS, 5)
    elif damage == "delete":
        (folder / TENSORS).unlink()
    else:
        folder.rename(tmp_path / "elsewhere")
    assert read(cache, "a") == (ord("a"), 300)
    assert len(remote.downloaded) == 2
    cache.check_integrity()


def test_a_cache_whose_folder_is_cleared_while_in_use_fills_again(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    [read(cache, name) for name in "abc"]
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").mkdir()
    assert [read(cache, name)[0] for name in "abc"] == [ord(name) for name in "abc"]
    cache.check_integrity()


def test_a_restart_finds_everything_and_the_worth_of_it(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    remote.seconds = {"s3://bucket/a": 60.0}
    [read(cache, name) for name in "abc"]
    again = make(tmp_path, remote)
    again.check_integrity()
    remote.downloaded.clear()
    read(again, "d")
    assert [read(again, name)[0] for name in "ad"] == [ord("a"), ord("d")]
    assert remote.downloaded == ["s3://bucket/d"], "a is dear to fetch and stays"


def test_after_a_restart_what_was_used_long_ago_goes_before_what_was_used_lately(
    tmp_path: Path, remote: FakeRemote
) -> None:
    cache = make(tmp_path, remote)
    folders = {}
    for name in "abc":
        with cache.open(source(name)) as folder:
            folders[name] = folder
    os.utime(folders["b"] / "entry.json", (0, 0))
    again = make(tmp_path, remote)
    read(again, "d")
    assert [folders[name].exists() for name in "abc"] == [True, False, True]


def test_a_smaller_budget_after_a_restart_evicts_at_once(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    [read(cache, name) for name in "abc"]
    again = make(tmp_path, remote, 400)
    assert (again.stats().num_bytes, on_disk(tmp_path)) == (300, 300)
    again.check_integrity()


@pytest.mark.parametrize("record", ["", "{}", "[1]", '{"files": {"../x": 1}}', '{"files": 3}'])
def test_entries_with_a_damaged_record_are_cleared_away(tmp_path: Path, remote: FakeRemote, record: str) -> None:
    cache = make(tmp_path, remote)
    with cache.open(source("a")) as folder:
        pass
    (folder / "entry.json").write_text(record)
    again = make(tmp_path, remote)
    assert not folder.exists()
    assert read(again, "a") == (ord("a"), 300)
    again.check_integrity()


def test_the_record_beside_an_entry_holds_only_what_is_needed(tmp_path: Path, remote: FakeRemote) -> None:
    with make(tmp_path, remote).open(source("a")) as folder:
        record = json.loads((folder / "entry.json").read_text())
    assert record.keys() == {"url", "version", "files", "fetch_seconds", "number"}
    assert record["files"] == {CONFIG: 2, TENSORS: 298}


def test_threads_that_want_one_adapter_fetch_it_once(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    entered, proceed = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert proceed.wait(10)

    remote.on_download = wait
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(read, cache, "a")
        assert entered.wait(10)
        others = [threads.submit(read, cache, "a") for _ in range(3)]
        proceed.set()
        assert [one.result(10) for one in (first, *others)] == [(ord("a"), 300)] * 4
    assert (len(remote.downloaded), len(remote.listed)) == (1, 1)


def test_a_slow_download_holds_up_no_other_adapter(tmp_path: Path, remote: FakeRemote) -> None:
    cache = make(tmp_path, remote)
    read(cache, "b")
    entered, proceed = threading.Event(), threading.Event()

    def wait() -> None:
        if remote.downloaded[-1].endswith("/a"):
            entered.set()
            assert proceed.wait(10)

    remote.on_download = wait
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(read, cache, "a")
        assert entered.wait(10)
        assert [read(cache, name)[0] for name in "bc"] == [ord("b"), ord("c")]
        assert cache.stats().pending_bytes == 300
        cache.check_integrity()
        proceed.set()
        assert slow.result(10) == (ord("a"), 300)


def test_two_caches_on_one_folder_share_entries_and_the_budget(tmp_path: Path, remote: FakeRemote) -> None:
    one, other = make(tmp_path, remote), make(tmp_path, remote)
    read(one, "a")
    read(other, "a")
    assert len(remote.downloaded) == 1
    with one.open(source("a")) as held:
        for name in "bcdefgh":
            read(other, name)
            assert on_disk(tmp_path) <= 1000
        assert content(held) == (ord("a"), 300), "another process does not evict what is open here"
    one.check_integrity()
    other.check_integrity()


def test_many_threads_over_two_caches_always_find_what_they_asked_for(tmp_path: Path, remote: FakeRemote) -> None:
    caches = [make(tmp_path, remote, 1300) for _ in range(2)]

    def work(seed: int) -> int:
        refused = 0
        random, beside = Random(seed), disk_folder.CacheFolder(tmp_path / "cache")
        for _ in range(25):
            name = random.choice("abcdefgh")
            try:
                assert read(caches[seed % 2], name) == (ord(name), 300)
            except TransientReadError:
                refused += 1
            with beside.changing():
                assert on_disk(tmp_path) <= 1300
        return refused

    with ThreadPoolExecutor(6) as threads:
        refused = sum(threads.map(work, range(6)))
    assert sum(cache.stats().misses for cache in caches) == len(remote.downloaded) + refused
    for cache in caches:
        cache.check_integrity()


def test_a_removal_that_fails_keeps_the_entry_in_the_books(
    tmp_path: Path, remote: FakeRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make(tmp_path, remote, 400)
    read(cache, "a")
    with monkeypatch.context() as patched:
        patched.setattr(disk_folder.CacheFolder, "remove", raising(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(TransientReadError, match="no room"):
            read(cache, "b")
    cache.check_integrity()
    assert read(cache, "b") == (ord("b"), 300)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


class CacheMachine(RuleBasedStateMachine):
    """Opens, closes, new versions, faults, damage and restarts, beside what each source holds."""

    names = st.sampled_from("abcdef")

    @initialize(limit=st.integers(400, 1500), lru=st.booleans())
    def start(self, limit: int, lru: bool) -> None:
        self.folder = TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.remote = FakeRemote()
        self.remote.adapters = {f"s3://bucket/{name}": (ord(name), 100 + 60 * i) for i, name in enumerate("abcdef")}
        self.limit, self.lru = limit, lru
        self.open_folders: list[tuple[ExitStack, Path, tuple[int, int]]] = []
        self.restart()

    @precondition(lambda self: not self.open_folders)
    @rule()
    def restart(self) -> None:
        order = LruOrder() if self.lru else None
        self.cache = make(self.root, self.remote, self.limit, order=order, check_seconds=0)

    @rule(name=names)
    def open(self, name: str) -> None:
        stack = ExitStack()
        faulty = bool(self.remote.write_faults)
        try:
            folder = stack.enter_context(self.cache.open(source(name)))
        except TransientReadError:
            assert self.open_folders or faulty
            return
        self.open_folders.append((stack, folder, self.remote.adapters[source(name).url]))

    @precondition(lambda self: self.open_folders)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open_folders) - 1))
        self.open_folders.pop(index)[0].close()

    @rule(name=names, marker=st.integers(1, 255), size=st.integers(50, 400))
    def publish(self, name: str, marker: int, size: int) -> None:
        self.remote.adapters[source(name).url] = (marker, size)

    @rule()
    def break_next_download(self) -> None:
        self.remote.write_faults = [TransientReadError("the line went dead")]

    @rule()
    def fill_disk_once(self) -> None:
        self.remote.write_faults = [OSError(errno.ENOSPC, "No space left on device")]

    @precondition(lambda self: not self.open_folders)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        files = sorted(self.root.rglob(TENSORS))
        if files:
            os.truncate(data.draw(st.sampled_from(files)), 7)
            # What is damaged is found when it is wanted, or at the next start.
            self.restart()

    @invariant()
    def open_folders_hold_what_was_opened(self) -> None:
        for _, folder, expected in self.open_folders:
            assert content(folder) == expected

    @invariant()
    def books_and_disk_agree(self) -> None:
        self.cache.check_integrity()
        assert on_disk(self.root) <= self.limit

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for stack, _, _ in self.open_folders:
                stack.close()
            self.folder.cleanup()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
