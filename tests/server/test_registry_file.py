from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.http_stack import register_adapters, restore_adapters
from loraplex.server.messages import AdapterInfo, AdapterRef, AdapterState
from loraplex.server.registry_file import KEPT, RegistryFile, SavedAdapter, StateFolderError, saved_adapters
from loraplex.server.settings import Settings


def saved(name: str, **facts: Any) -> SavedAdapter:
    defaults: dict[str, Any] = {"path": f"/adapters/{name}", "origin": "api", "created": 7}
    return SavedAdapter(name=name, **(defaults | facts))


def restored(state: RegistryFile, registry: AdapterRegistry | None = None, **rules: Any) -> AdapterRegistry:
    registry = registry or AdapterRegistry("base")
    restore_adapters(registry, state, SourceRules(**rules))
    registry.check_integrity()
    return registry


def uploaded(state: RegistryFile, name: str) -> Path:
    folder = state.adapters / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_what_was_registered_over_http_is_there_again(state: RegistryFile) -> None:
    registry = AdapterRegistry("base")
    registry.register_all([registry.new_ref("plain", "/a/plain"), registry.new_ref("pinned", "/a/pinned")])
    registry.change("pinned", pinned=True, tags=("x",))
    registry.register(registry.new_ref("mine", "s3://bucket/mine"), origin="api", tags=("y",), created=5)
    info = AdapterInfo(identity="abc", kind="lora", rank=1, targets=[], bytes=1, pages=1)
    registry.register(registry.new_ref("alias", "/a/plain"), info, origin="api")
    state.write(saved_adapters(registry))

    fresh = AdapterRegistry("base")
    fresh.register_all([fresh.new_ref("plain", "/a/plain"), fresh.new_ref("pinned", "/a/pinned")])
    restored(state, fresh, prefixes=["s3://bucket"])
    assert [one.ref.name for one in fresh.listed()[0]] == ["alias", "mine", "pinned", "plain"]
    mine, pinned, alias = (fresh.named(name, "") for name in ("mine", "pinned", "alias"))
    assert (mine.ref.path, mine.tags, mine.created, mine.origin) == ("s3://bucket/mine", ("y",), 5, "api")
    assert (pinned.pinned, pinned.tags, pinned.origin) == (True, ("x",), "folder")
    assert (alias.identity, alias.info) == ("abc", None)
    assert {one.adapter.name: (one.identity, one.pinned) for one in fresh.restored()} == {
        "alias": ("abc", False),
        "pinned": (None, True),
    }


def test_a_name_moved_over_http_stands_for_that_and_not_for_its_folder(state: RegistryFile) -> None:
    state.write([saved("red", path="/elsewhere/red"), saved("blue", origin="folder", path="/old/blue", pinned=True)])
    registry = AdapterRegistry("base")
    registry.register_all([registry.new_ref("red", "/folder/red"), registry.new_ref("blue", "/folder/blue")])
    restored(state, registry)
    assert registry.named("red", "").ref.path == "/elsewhere/red"
    assert not registry.named("blue", "").pinned, "it was another folder that was pinned"


def test_entries_that_cannot_be_read_are_left_out_by_name_and_stay_in_the_file(
    state: RegistryFile, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [msgspec.to_builtins(saved("good")), {"name": "bad"}, {"name": "a/b", "path": "x"}, 7]
    entries.append(msgspec.to_builtins(saved("evil/../name")))
    (state.folder / "registry.json").write_text(json.dumps({"version": 1, "adapters": entries}))
    assert [one.name for one in state.read()] == ["good"]
    told = capsys.readouterr().out
    assert all(name in told for name in ("bad", "a/b", "evil/../name"))
    state.write([saved("new")])
    again = json.loads((state.folder / "registry.json").read_text())["adapters"]
    assert [one["name"] if isinstance(one, dict) else one for one in again] == ["bad", "a/b", 7, "evil/../name", "new"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x00" * 100, b"[1]", b'{"version": "x", "adapters": []}', b"[" * 99999]
)
def test_a_spoilt_file_is_set_aside_and_no_upload_is_lost(state: RegistryFile, content: bytes) -> None:
    (state.folder / "registry.json").write_bytes(content)
    folder = uploaded(state, "abc")
    assert len(restored(state)) == 0
    assert (state.folder / "registry.json.corrupt").read_bytes() == content
    assert folder.is_dir()


def test_a_file_of_a_later_version_is_not_touched(state: RegistryFile) -> None:
    (state.folder / "registry.json").write_text('{"version": 2, "adapters": []}')
    with pytest.raises(StateFolderError, match="later version"):
        state.read()
    assert (state.folder / "registry.json").exists()


def test_a_state_folder_has_one_server(tmp_path: Path, state: RegistryFile) -> None:
    script = (
        "import sys; from pathlib import Path; from loraplex.server.registry_file import RegistryFile;"
        "RegistryFile(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(state.folder)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "state_dir" in refused.stderr
    assert "in use by another server" in refused.stderr
    state.close()
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


def test_a_state_folder_that_cannot_be_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateFolderError, match=r"state_dir: .*cannot be used"):
        RegistryFile(tmp_path / "file")


def test_what_a_write_cannot_finish_leaves_the_old_file(state: RegistryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write([saved("old")])

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(StateFolderError, match="No space left"):
        state.write([saved("new")])
    monkeypatch.undo()
    assert [one.name for one in state.read()] == ["old"]


def test_what_nobody_names_is_removed_at_the_start_but_what_is_kept_on_purpose(state: RegistryFile) -> None:
    used, lost, kept = (uploaded(state, name) for name in ("used", "lost", "kept"))
    (kept / KEPT).touch()
    (state.staging / "cut-off").mkdir()
    state.write([saved("red", origin="upload", path=str(used))])
    assert restored(state).named("red", "").origin == "upload"
    assert (used.exists(), lost.exists(), kept.exists()) == (True, False, True)
    assert list(state.staging.iterdir()) == []


def test_a_relative_folder_of_adapters_gives_the_paths_that_its_watch_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "looping"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "adapter_config.json").write_text("{}")
    (tmp_path / "looping" / "adapter_config.json").symlink_to(tmp_path / "looping" / "adapter_config.json")
    monkeypatch.chdir(tmp_path)
    registry = AdapterRegistry("base")
    scan = register_adapters(registry, Settings.model_validate({"model": "/model", "adapters": "."}))
    paths = {name: found.path for name, found in scan.items()}
    assert paths == {one.ref.name: one.ref.path for one in registry} == {"good": str(tmp_path / "good")}


def test_entries_that_are_of_no_use_now_are_kept_for_later(state: RegistryFile, tmp_path: Path) -> None:
    gone = saved("gone", origin="upload", path=str(state.adapters / "gone"))
    out = [saved("bucket", path="s3://bucket/x"), saved("base"), saved("out", path=str(tmp_path))]
    state.write([gone, *out, saved("ok")])
    registry = restored(state, roots=[Path("/adapters")])
    assert [one.ref.name for one in registry] == ["ok"]
    state.write(saved_adapters(registry))
    assert {one.name for one in state.read()} == {"gone", "bucket", "base", "out", "ok"}


def test_what_entries_that_are_left_out_name_is_kept_and_the_rest_is_not(state: RegistryFile) -> None:
    of_raw, of_base, orphan = (uploaded(state, name) for name in ("aa", "bb", "cc"))
    entries = [{"name": 7, "path": str(of_raw)}, msgspec.to_builtins(saved("base", origin="upload", path=str(of_base)))]
    (state.folder / "registry.json").write_text(json.dumps({"version": 1, "adapters": entries}))
    restored(state)
    assert (of_raw.exists(), of_base.exists(), orphan.exists()) == (True, True, False)


def test_an_entry_that_was_left_out_goes_once_its_name_is_registered_or_removed(state: RegistryFile) -> None:
    state.write([saved(name, path=f"s3://bucket/{name}") for name in ("new", "removed", "left", "folder")])
    restored(state)
    state.forget("removed")
    state.write([saved("new"), saved("folder", origin="folder", pinned=True)])
    state.write([])
    assert [one.name for one in state.read()] == ["left", "folder"]


@pytest.mark.parametrize("later", ["volume/state", "link/../volume/state", "moved/state"])
def test_uploads_are_there_however_the_state_folder_is_spelled(tmp_path: Path, later: str) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    file = RegistryFile(tmp_path / "link" / "state")
    folder = uploaded(file, "abc")
    # Earlier versions wrote the path as it was spelled.
    file.write([saved("red", origin="upload", path=str(tmp_path / "link" / "state" / "adapters" / "abc"))])
    file.close()
    if later.startswith("moved"):
        (tmp_path / "volume").rename(tmp_path / "moved")
    file = RegistryFile(tmp_path / later)
    path = Path(restored(file).named("red", "").ref.path)
    file.close()
    assert path == file.adapters / folder.name
    assert path.is_dir()


def test_a_link_to_an_upload_uses_it(state: RegistryFile, tmp_path: Path) -> None:
    folder = uploaded(state, "abc")
    (tmp_path / "link").symlink_to(folder)
    state.write([])
    registry = AdapterRegistry("base")
    registry.register_all([registry.new_ref("red", str(tmp_path / "link"))])
    restored(state, registry)
    assert folder.is_dir()


def test_no_saved_path_makes_the_state_folder_itself_an_upload(state: RegistryFile) -> None:
    state.write([saved("red", origin="upload", path="/x/.."), saved("blue", origin="upload", path="")])
    assert len(restored(state)) == 0


def test_uploads_of_a_spoilt_file_stay_until_it_is_taken_away(state: RegistryFile) -> None:
    folder = uploaded(state, "abc")
    (state.folder / "registry.json").write_text("{broken")
    for _ in range(3):
        restored(state)
        assert folder.is_dir()
        state.write([saved("new")])
    (state.folder / "registry.json.corrupt").unlink()
    (state.folder / "registry.json.tmp").write_text("of a write that was cut off")
    restored(state)
    assert sorted(path.name for path in state.folder.iterdir()) == ["adapters", "lock", "registry.json", "staging"]
    assert not folder.exists()


names = st.text('abcé "\\{', min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(st.tuples(names, st.booleans(), st.lists(names, max_size=3)), max_size=8, unique_by=lambda one: one[0]))
def test_any_registry_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, entries: Any) -> None:
    file = RegistryFile(tmp_path_factory.mktemp("state"))
    try:
        written = [
            saved(name.replace("\\", ""), pinned=pinned, tags=tuple(tags))
            for name, pinned, tags in entries
            if name.replace("\\", "").strip() == name.replace("\\", "") and name.replace("\\", "")
        ]
        file.write(written)
        assert file.read() == written
    finally:
        file.close()


def test_news_of_the_engine_are_kept_by_registration() -> None:
    registry = AdapterRegistry("base")
    ref = registry.new_ref("red", "/red")
    registry.register(ref)
    info = AdapterInfo(identity="abc", kind="lora", rank=1, targets=[], bytes=1, pages=1)
    old = AdapterState(path="/red", revision=ref.revision + 1, info=info)
    assert not registry.note([old])
    assert registry.named("red", "").info is None
    now = AdapterState(path="/red", revision=ref.revision, info=info)
    assert registry.note([now])
    assert not registry.note([now]), "the same again is no news"
    assert registry.named("red", "").identity == "abc"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["register", "remove", "change"])), max_size=30))
def test_names_stay_in_order_whatever_happens(steps: list[tuple[str, str]]) -> None:
    registry = AdapterRegistry("base")
    model: dict[str, tuple[str, ...]] = {}
    for at, (name, what) in enumerate(steps):
        if what == "register":
            registry.register(registry.new_ref(name, f"/{at}"), tags=(str(at),))
            model[name] = (str(at),)
        elif what == "remove":
            assert (registry.remove(name) is not None) == (model.pop(name, None) is not None)
        else:
            registry.change(name, tags=("changed",))
            model |= {name: ("changed",)} if name in model else {}
        registry.check_integrity()
        assert [(one.ref.name, one.tags) for one in registry.listed()[0]] == sorted(model.items())


def test_lists_are_paged_by_prefix_and_filter() -> None:
    registry = AdapterRegistry("base")
    registry.register_all(
        AdapterRef(name=f"{team}-{at:02}", path=f"/{team}/{at}") for team in "abc" for at in range(20)
    )

    def listed(**asked: Any) -> tuple[list[str], bool]:
        adapters, more = registry.listed(**asked)
        return [one.ref.name for one in adapters], more

    assert listed(prefix="b-", limit=2) == (["b-00", "b-01"], True)
    assert listed(prefix="b-", after="b-17") == (["b-18", "b-19"], False)
    assert listed(prefix="b-", after="a-17", limit=1) == (["b-00"], True)
    assert listed(prefix="b-", after="c-01") == ([], False)
    even = listed(prefix="c", limit=3, after="c-02", accept=lambda one: int(one.ref.name[2:]) % 2 == 0)
    assert even == (["c-04", "c-06", "c-08"], True)
    assert listed(limit=1, accept=lambda one: one.ref.name == "c-19") == (["c-19"], False)
