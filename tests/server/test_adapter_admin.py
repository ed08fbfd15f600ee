from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules, source_kind
from loraplex.server.errors import AdapterInvalidError, AdapterTooLargeError, ConflictError, InvalidRequestError
from loraplex.server.folder_scan import scan_folder
from loraplex.server.http_stack import register_adapters, restore_adapters
from loraplex.server.messages import AdapterRef, ErrorInfo
from loraplex.server.registry_file import RegistryFile
from loraplex.server.settings import load_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "green"
    folder.mkdir()
    return folder


def register(client: TestClient, name: str, path: Path | str, **fields: Any) -> Any:
    return client.post("/v1/adapters", json={"id": name, "path": str(path)} | fields)


def listed(client: TestClient, **params: Any) -> list[str]:
    answer = client.get("/v1/adapters", params=params)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


def test_registrations_pins_and_tags_survive_a_restart(
    make_client: Callable[..., TestClient], state: RegistryFile, folder: Path, tmp_path: Path
) -> None:
    with make_client(state=state) as client:
        register(client, "green", folder, pinned=True, tags=["a"])
        register(client, "gone", folder)
        client.patch("/v1/adapters/red", json={"tags": ["b"]})
        client.delete("/v1/adapters/gone")
    again = RegistryFile(tmp_path / "state")
    fresh = AdapterRegistry("tiny")
    fresh.register_all([AdapterRef(name="red", path="/adapters/red")])
    restore_adapters(fresh, again, SourceRules())
    again.close()
    green = fresh.named("green", "")
    assert (green.pinned, green.tags, green.ref.path, green.identity) == (True, ("a",), str(folder), "id-1")
    assert fresh.named("red", "").tags == ("b",)
    assert len(fresh) == 2


def test_a_change_is_on_the_disk_before_it_is_answered(
    make_client: Callable[..., TestClient], state: RegistryFile, folder: Path
) -> None:
    with make_client(state=state) as client:
        for name in ("one", "two"):
            register(client, name, folder)
            assert name in {one.name for one in state.read()}
        client.delete("/v1/adapters/one")
        assert {one.name for one in state.read()} == {"two"}


def test_what_an_engine_finds_out_is_kept_at_the_latest_at_the_end(
    make_client: Callable[..., TestClient], state: RegistryFile, engine: Any, registry: Any, folder: Path
) -> None:
    with make_client(state=state) as client:
        registry.register(registry.new_ref("lazy", str(folder)), origin="api")
        client.portal.call(engine.tell, registry.named("lazy", "").ref)  # type: ignore[union-attr]
    assert {one.name: one.identity for one in state.read()} == {"lazy": "id-1"}


def test_a_new_engine_hears_of_identities_and_pins(client: TestClient, engine: Any, folder: Path) -> None:
    register(client, "green", folder, pinned=True)
    restore = client.app.state.edge.registry.restored()  # type: ignore[attr-defined]
    assert [(one.adapter.name, one.identity, one.pinned) for one in restore] == [("green", "id-1", True)]
    assert engine.restored == [[]], "the app tells what it knows when it starts"


def test_adapters_read_lazily_become_known_through_the_engines_news(client: TestClient, engine: Any) -> None:
    red = client.app.state.edge.registry.named("red", "").ref  # type: ignore[attr-defined]
    engine.tell(red, tier="pool")
    card = client.get("/v1/adapters/red").json()
    assert (card["state"], card["tier"], card["rank"], card["identity"]) == ("ready", "pool", 8, "id-0")
    assert client.get("/v1/models/red").json()["kind"] == "lora"
    engine.tell(red, error=ErrorInfo(name="AdapterInvalidError", message="changed", code="adapter_invalid"))
    card = client.get("/v1/adapters/red").json()
    assert (card["state"], card["tier"], card["rank"]) == ("failed", "disk", 8)
    assert card["error"] == {"message": "changed", "param": None, "code": "adapter_invalid"}
    engine.state = "restarting"
    card = client.get("/v1/adapters/red").json()
    assert (card["state"], card["tier"], card["error"]) == ("ready", "disk", None)


def test_running_counts_the_open_requests_of_an_adapter(client: TestClient, engine: Any) -> None:
    red = client.app.state.edge.registry.named("red", "").ref  # type: ignore[attr-defined]
    engine.open += [red, red]
    assert client.get("/v1/adapters/red").json()["running"] == 2


def test_lists_are_filtered_by_state_tier_kind_tag_pin_and_prefix(
    client: TestClient, engine: Any, tmp_path: Path
) -> None:
    for name, kind in (("a1", "lora"), ("a2", "mixlora"), ("b1", "lora")):
        (tmp_path / name).mkdir()
        engine.facts = {"kind": kind}
        register(client, name, tmp_path / name, tags=[name[0]], pinned=name == "b1")
    assert listed(client, state="registered") == ["blue", "red"]
    assert listed(client, state="ready", kind="lora") == ["a1", "b1"]
    assert listed(client, tier="pool") == listed(client, pinned=True) == ["b1"]
    assert listed(client, tier="host") == ["a1", "a2"]
    assert listed(client, tag="a") == listed(client, prefix="a") == ["a1", "a2"]
    assert listed(client, pinned="false", state="ready", tag="a", kind="mixlora", tier="host") == ["a2"]
    assert listed(client, state="failed") == listed(client, tag="none") == []
    first = client.get("/v1/adapters", params={"state": "ready", "limit": 2}).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["a1", "a2"], True)
    assert listed(client, state="ready", limit=2, after="a2") == ["b1"]


@pytest.mark.parametrize(
    ("params", "accepted"),
    [
        ({"state": "lost"}, "'registered', 'loading', 'ready' or 'failed'"),
        ({"tier": "gpu"}, "'disk', 'host' or 'pool'"),
        ({"kind": "qlora"}, "'mixlora'"),
        ({"pinned": "perhaps"}, "boolean"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"limit": 10_001}, "less than or equal to 10000"),
    ],
)
def test_a_filter_that_there_is_not_names_what_is_accepted(client: TestClient, params: Any, accepted: str) -> None:
    answer = client.get("/v1/adapters", params=params)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, next(iter(params)))
    assert accepted in error["message"]


def test_a_long_list_comes_in_pages_of_a_thousand(client: TestClient, registry: AdapterRegistry) -> None:
    registry.register_all(registry.new_ref(f"x{at:04}", f"/x/{at}") for at in range(1500))
    answer = client.get("/v1/adapters").json()
    assert (len(answer["data"]), answer["has_more"]) == (1000, True)
    assert len(client.get("/v1/models").json()["data"]) == 1503


def test_two_names_may_stand_for_one_path(client: TestClient, engine: Any, folder: Path) -> None:
    for name in ("one", "two"):
        assert register(client, name, folder).status_code == 200
    client.delete("/v1/adapters/one")
    assert client.get("/v1/adapters/two").json()["state"] == "ready"
    assert [(ref.name, ref.revision) for ref in engine.unloaded] == [("one", 1)]


def test_a_name_moves_in_place_and_keeps_its_pin_and_tags(client: TestClient, engine: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    register(client, "green", tmp_path / "one", pinned=True, tags=["a"])
    assert register(client, "green", tmp_path / "two").json()["error"]["code"] == "conflict"
    moved = client.patch("/v1/adapters/green", json={"path": str(tmp_path / "two")}).json()
    assert (moved["path"], moved["revision"], moved["pinned"], moved["tags"]) == (str(tmp_path / "two"), 2, True, ["a"])
    assert engine.pins == [("green", 1, True), ("green", 1, False), ("green", 2, True)]
    assert [(ref.name, ref.revision) for ref in engine.unloaded] == [("green", 1)]
    back = register(client, "green", tmp_path / "one", replace=True, tags=[], pinned=False).json()
    assert (back["revision"], back["pinned"], back["tags"]) == (3, False, [])


def test_a_move_that_fails_leaves_name_and_pin(client: TestClient, engine: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    register(client, "green", tmp_path / "one", pinned=True)
    engine.load_error = AdapterInvalidError("broken")
    assert client.patch("/v1/adapters/green", json={"path": str(tmp_path / "two")}).status_code == 400
    engine.load_error, engine.pin_error = None, AdapterTooLargeError("too much is pinned")
    assert client.patch("/v1/adapters/green", json={"path": str(tmp_path / "two")}).status_code == 400
    card = client.get("/v1/adapters/green").json()
    assert (card["path"], card["revision"], card["pinned"], card["state"]) == (str(tmp_path / "one"), 1, True, "ready")
    assert [ref.revision for ref in engine.unloaded] == [2, 3]


def test_pin_unpin_and_prefetch(client: TestClient, engine: Any) -> None:
    assert client.post("/v1/adapters/red/pin").json()["pinned"] is True
    assert client.get("/v1/adapters/red").json()["tier"] == "pool"
    assert client.post("/v1/adapters/red/unpin", json={}).json()["pinned"] is False
    assert client.post("/v1/adapters/blue/prefetch").json()["tier"] == "pool"
    assert client.post("/v1/adapters/blue/prefetch", json={"tier": "host"}).json()["tier"] == "host"
    assert engine.prefetched == [("blue", "pool"), ("blue", "host")]
    answer = client.post("/v1/adapters/blue/prefetch", json={"tier": "disk"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tier")
    for what in ("pin", "unpin", "prefetch"):
        assert client.post(f"/v1/adapters/none/{what}").status_code == 404


def test_a_pin_beyond_the_bound_changes_nothing(client: TestClient, engine: Any) -> None:
    engine.pin_error = ConflictError("Pinned adapters may take 8 pages.")
    assert client.post("/v1/adapters/red/pin").status_code == 409
    assert client.get("/v1/adapters/red").json()["pinned"] is False


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tags": "a"}, "tags"),
        ({"tags": ["a,b"]}, "tags"),
        ({"tags": [""]}, "tags"),
        ({"tags": [str(at) for at in range(33)]}, "tags"),
        ({"pinned": "true"}, "pinned"),
        ({"path": "/no/such"}, "path"),
        ({"name": "x"}, "name"),
    ],
)
def test_a_change_out_of_range_is_named(client: TestClient, body: Any, param: str) -> None:
    answer = client.patch("/v1/adapters/red", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert client.patch("/v1/adapters/none", json={"tags": []}).status_code == 404


def test_remote_sources_are_refused_unless_they_are_allowed(make_client: Any, engine: Any) -> None:
    closed, opened = make_client(), make_client(adapter_sources=("s3://bucket/team", "hf://org"))
    answer = register(closed, "far", "s3://bucket/team/x")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path")
    assert "adapter_sources" in answer.json()["error"]["message"]
    card = register(opened, "far", "S3://bucket/team/x/").json()
    assert (card["path"], card["source"]) == ("s3://bucket/team/x", "s3")
    assert register(opened, "hub", "hf://org/name@v1").json()["source"] == "hf"
    for path in ("s3://bucket/team2/x", "s3://bucket/team/../other", "s3://user:secret@bucket/team/x", "hf://other/x"):
        answer = register(opened, "bad", path)
        assert answer.status_code == 400, path
        assert "secret" not in answer.text
    assert [source_kind(path) for path in ("/a", "file:///a", "gs://bucket/a", "x://a")] == [
        "file",
        "file",
        "gs",
        "file",
    ]


def test_a_file_address_is_a_folder(client: TestClient, folder: Path) -> None:
    assert register(client, "green", f"file://{folder}").json()["path"] == str(folder)


def test_sglangs_forms_are_answered_as_it_does(client: TestClient, engine: Any, folder: Path) -> None:
    body = {"lora_name": "green", "lora_path": str(folder), "pinned": True}
    answer = client.post("/load_lora_adapter", json=body).json()
    assert (answer["success"], answer["error_message"], answer["loaded_adapters"]["green"]) == (True, None, str(folder))
    assert client.get("/v1/adapters/green").json()["pinned"] is True
    refused = client.post("/load_lora_adapter", json=body | {"lora_path": "/no/such"})
    assert (refused.status_code, refused.json()["success"]) == (400, False)
    assert "no folder" in refused.json()["error_message"]
    gone = client.post("/unload_lora_adapter", json={"lora_name": "green"}).json()
    assert (gone["success"], sorted(gone["loaded_adapters"])) == (True, ["blue", "red"])
    assert client.post("/unload_lora_adapter", json={"lora_name": "green"}).status_code == 404


def test_sagemakers_forms_are_served(client: TestClient, folder: Path) -> None:
    assert client.post("/adapters", json={"name": "green", "src": str(folder)}).status_code == 200
    answer = client.post("/adapters", json={"name": "green", "src": "/no/such"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "src")
    assert client.delete("/adapters/green").status_code == 200
    assert client.delete("/adapters/green").status_code == 404


def test_a_salt_goes_with_the_request(client: TestClient, engine: Any) -> None:
    assert client.post("/v1/completions", json={"prompt": "a", "cache_salt": "tenant"}).status_code == 200
    messages = [{"role": "user", "content": "a"}]
    assert client.post("/v1/chat/completions", json={"messages": messages, "cache_salt": "x" * 256}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    assert [command.cache_salt for command in engine.commands] == ["tenant", "x" * 256, ""]
    for salt in ("x" * 257, 7):
        answer = client.post("/v1/completions", json={"prompt": "a", "cache_salt": salt})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_ten_thousand_adapters_of_a_folder_are_registered_unread_in_seconds(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    root.mkdir()
    for at in range(10_000):
        folder = root / f"a{at:05}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("not even JSON")
    registry = AdapterRegistry("tiny")
    settings = load_settings({"model": "base", "adapters": str(root), "adapter": ["far=s3://bucket/far"]})
    started = time.monotonic()
    found = register_adapters(registry, settings)
    assert time.monotonic() - started < 10
    assert (len(found), len(registry)) == (10_000, 10_001)
    assert registry.named("far", "").origin == "setting"
    assert found == scan_folder(root)
    assert {int(one.ref.path[-5:]) for one in registry if one.origin == "folder"} == set(range(10_000))


def test_a_setting_that_is_no_source_stops_the_start(tmp_path: Path) -> None:
    for entry in ("x=s3://u:p@bucket/a", "x=/no/such/folder"):
        settings = load_settings({"model": "base", "adapter": [entry]})
        with pytest.raises(InvalidRequestError, match="adapter x="):
            register_adapters(AdapterRegistry("tiny"), settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_listed_stops_the_start(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    root.mkdir(mode=0o000)
    with pytest.raises(AdapterInvalidError, match="cannot be listed"):
        register_adapters(AdapterRegistry("tiny"), load_settings({"model": "base", "adapters": str(root)}))


def test_streams_tell_the_cached_tokens_in_their_usage(client: TestClient) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    events = [
        line.removeprefix("data: ") for line in client.post("/v1/completions", json=body).text.splitlines() if line
    ]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
