from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.adapter_files import find_adapters
from loraplex.server import adapter_watch
from loraplex.server.adapter_admin import AdapterAdmin, Wishes
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.adapter_watch import AdapterWatch
from loraplex.server.errors import AdapterInvalidError, UnavailableError
from loraplex.server.folder_scan import Found, SettledChanges, scan_folder
from loraplex.server.registry_keeper import RegistryKeeper

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write(root: Path, name: str, content: str = "weights") -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    for file, text in ((CONFIG, "{}"), (WEIGHTS, content)):
        (folder / f"{file}.tmp").write_text(text)
        (folder / f"{file}.tmp").replace(folder / file)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    for name in ("red", "blue"):
        write(root, name)
    return root


class Watched:
    """A registry that follows a folder, looked at by hand."""

    def __init__(self, engine: Any, root: Path) -> None:
        self.engine, self.root = engine, root
        self.registry = AdapterRegistry("tiny")
        scan = scan_folder(root)
        self.registry.register_all(self.registry.new_ref(name, found.path) for name, found in scan.items())
        self.admin = AdapterAdmin(engine, self.registry, SourceRules(), RegistryKeeper(self.registry, None))
        self.watch = AdapterWatch(self.admin, root, 0.01, scan)

    async def settle(self) -> None:
        for _ in range(2):
            await self.watch.look()
        self.registry.check_integrity()

    @property
    def revisions(self) -> dict[str, int]:
        return {one.ref.name: one.ref.revision for one in self.registry.listed()[0]}


@pytest.fixture
def watched(engine: Any, root: Path) -> Watched:
    return Watched(engine, root)


async def test_what_does_not_change_is_left_alone(watched: Watched) -> None:
    await watched.settle()
    assert (watched.revisions, watched.engine.unloaded) == ({"blue": 2, "red": 1}, [])


async def test_a_new_folder_is_registered_unread_once_it_is_settled(watched: Watched) -> None:
    write(watched.root, "green", "half")
    await watched.watch.look()
    write(watched.root, "green", "whole now")
    await watched.watch.look()
    assert "green" not in watched.revisions, "it has changed between two looks"
    await watched.watch.look()
    assert watched.registry.named("green", "").ref.path == str(watched.root / "green")
    assert watched.engine.loaded == {}


async def test_a_changed_folder_that_nobody_has_read_is_another_registration(watched: Watched) -> None:
    await watched.admin.change("red", Wishes(tags=("kept",)))
    write(watched.root, "red", "other")
    await watched.settle()
    assert watched.revisions == {"blue": 2, "red": 3}
    assert watched.registry.named("red", "").tags == ("kept",)
    assert [(ref.name, ref.revision) for ref in watched.engine.unloaded] == [("red", 1)]
    assert watched.engine.loaded == {}


async def test_a_changed_folder_that_was_read_is_verified_before_the_name_moves(watched: Watched) -> None:
    await watched.admin.change("red", Wishes(pinned=True))
    seen: list[int] = []
    watched.engine.on_load = lambda ref: seen.append(watched.registry.named("red", "").ref.revision)
    write(watched.root, "red", "other")
    await watched.settle()
    assert (watched.revisions["red"], seen) == (3, [1])
    assert watched.engine.pins == [("red", 1, True), ("red", 1, False), ("red", 3, True)]


async def test_a_refused_content_leaves_the_old_registration_and_is_told_of_once(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    await watched.admin.prefetch("red", "host")
    watched.engine.load_error = AdapterInvalidError("lora_A has rank 4")
    write(watched.root, "red", "broken")
    for _ in range(3):
        await watched.settle()
    assert watched.revisions["red"] == 1
    assert capsys.readouterr().out.count("lora_A has rank 4") == 1
    watched.engine.load_error = None
    write(watched.root, "red", "mended")
    await watched.settle()
    assert watched.revisions["red"] > 1


async def test_a_change_waits_for_an_engine_to_verify_it(watched: Watched) -> None:
    await watched.admin.prefetch("red", "host")
    watched.engine.load_error = UnavailableError("restarting")
    write(watched.root, "red", "other")
    await watched.settle()
    assert watched.revisions["red"] == 1
    watched.engine.load_error = None
    await watched.watch.look()
    assert watched.revisions["red"] > 1


async def test_a_vanished_folder_is_unregistered_and_comes_back_as_another(watched: Watched) -> None:
    shutil.rmtree(watched.root / "red")
    await watched.watch.look()
    assert "red" in watched.revisions, "it could be on its way back"
    await watched.watch.look()
    assert watched.revisions == {"blue": 2}
    assert [ref.name for ref in watched.engine.unloaded] == ["red"]
    write(watched.root, "red")
    await watched.settle()
    assert watched.revisions == {"blue": 2, "red": 3}


async def test_a_folder_that_loses_all_its_adapters_at_once_loses_none(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("red", "blue"):
        (watched.root / name).rename(watched.root.parent / name)
    await watched.settle()
    assert watched.revisions == {"red": 1, "blue": 2}
    assert capsys.readouterr().out.count("is empty") == 1
    (watched.root.parent / "blue").rename(watched.root / "blue")
    await watched.settle()
    assert watched.revisions.keys() == {"blue"}


async def test_a_link_that_points_elsewhere_is_a_change(engine: Any, root: Path, tmp_path: Path) -> None:
    first, second = (write(tmp_path, name) for name in ("v1", "v2"))
    os.utime(second / WEIGHTS, ns=(5, (first / WEIGHTS).stat().st_mtime_ns))
    (root / "green").symlink_to(first)
    watched = Watched(engine, root)
    revision = watched.revisions["green"]
    (root / "next").symlink_to(second)
    (root / "next").rename(root / "green")
    await watched.settle()
    assert watched.revisions["green"] > revision


async def test_names_registered_over_http_are_left_alone(watched: Watched, tmp_path: Path) -> None:
    theirs = write(tmp_path, "theirs")
    await watched.admin.load("red", str(theirs), replace=True, params=("id", "path"))
    await watched.admin.load("green", str(theirs), replace=False, params=("id", "path"))
    before = watched.revisions
    write(watched.root, "green")
    write(watched.root, "red", "other")
    await watched.settle()
    shutil.rmtree(watched.root / "red")
    await watched.settle()
    assert watched.revisions == before


async def test_a_name_removed_over_http_stays_away_until_its_folder_changes(watched: Watched) -> None:
    await watched.admin.unload("red", "id")
    await watched.settle()
    assert "red" not in watched.revisions
    write(watched.root, "red", "other")
    await watched.settle()
    assert "red" in watched.revisions


async def test_a_folder_that_cannot_be_read_removes_nothing(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.root.rename(watched.root.with_name("away"))
    for _ in range(3):
        await watched.settle()
    assert watched.revisions == {"blue": 2, "red": 1}
    assert capsys.readouterr().out.count("cannot be read; adapters stay") == 1
    watched.root.with_name("away").rename(watched.root)
    await watched.settle()
    assert watched.revisions == {"blue": 2, "red": 1}


async def test_an_entry_that_cannot_be_looked_at_stays_as_it_was_and_hides_no_other(watched: Watched) -> None:
    looping = watched.root / "looping"
    looping.symlink_to(looping)
    (watched.root / "red").rename(watched.root.with_name("red"))
    (watched.root / "red").symlink_to(watched.root / "red")
    write(watched.root, "green")
    await watched.settle()
    assert watched.revisions == {"blue": 2, "red": 1, "green": 3}
    assert set(scan_folder(watched.root)) == {"blue", "green"}
    (watched.root / "red").unlink()
    await watched.settle()
    assert set(watched.revisions) == {"blue", "green"}


async def test_a_folder_with_the_base_models_name_is_refused_once(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    write(watched.root, "tiny")
    for _ in range(3):
        await watched.settle()
    assert "tiny" not in watched.revisions
    assert capsys.readouterr().out.count("the name of the base model") == 1


async def test_the_watch_goes_on_whatever_happens(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()
    calls = 0

    def scan(folder: Path, before: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a fault of ours")
        if calls == 3:
            looked.set()
        return scan_folder(folder, before)

    monkeypatch.setattr(adapter_watch, "scan_folder", scan)
    async with watched.watch.running():
        await asyncio.wait_for(looked.wait(), 10)


def test_the_app_follows_its_folder_while_it_serves(
    make_client: Callable[..., Any], registry: AdapterRegistry, root: Path
) -> None:
    with make_client(watch=lambda admin: AdapterWatch(admin, root, 0.005, {})) as client:
        deadline = time.monotonic() + 10
        while registry.named("red", "").ref.path != str(root / "red") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/v1/adapters/red").json()["path"] == str(root / "red")


def test_a_scan_finds_what_the_start_finds(root: Path, tmp_path: Path) -> None:
    (root / "no adapter").mkdir()
    (root / "file").write_text("")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / ".hidden").mkdir()
    (root / ".hidden" / CONFIG).write_text("{}")
    (root / "folder as config" / CONFIG).mkdir(parents=True)
    (root / "config only").mkdir()
    (root / "config only" / CONFIG).write_text("{}")
    for folder in (root, root / "red"):
        found = {name: str(path) for name, path in find_adapters(folder).paths.items()}
        assert {name: one.path for name, one in scan_folder(folder).items()} == found
    with pytest.raises(FileNotFoundError):
        scan_folder(tmp_path / "nowhere")


contents = st.none() | st.integers(0, 2)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys("ab", contents)), min_size=2, max_size=12), st.data())
def test_a_change_counts_when_two_looks_in_a_row_agree(looks: list[dict[str, int | None]], data: Any) -> None:
    acted: dict[str, int | None] = {"a": 0, "b": None}
    changes = SettledChanges({"a": found("a", 0)})
    for before, now in zip([{}, *looks], looks):
        told = changes.of({name: found(name, content) for name, content in now.items() if content is not None})
        expected = {name for name in now if now[name] != acted[name] and before.get(name, -1) == now[name]}
        assert told.changed.keys() | told.vanished.keys() == expected
        assert set(told.vanished) == {name for name in expected if now[name] is None}
        for name in sorted(expected):
            if data.draw(st.booleans()):
                changes.accept(name, told.changed.get(name))
                acted[name] = now[name]


def found(name: str, content: int) -> Found:
    return Found(f"/{name}", ((1, content, 1, 1),))
