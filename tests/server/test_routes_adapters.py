from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.adapter_admin import AdapterAdmin
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.errors import AdapterInvalidError, InvalidRequestError
from loraplex.server.messages import AdapterRef
from loraplex.server.registry_keeper import RegistryKeeper


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "green"
    folder.mkdir()
    return folder


def load(client: TestClient, name: str, path: Path | str, **fields: Any) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)


def names(client: TestClient) -> list[str]:
    return [one["id"] for one in client.get("/v1/adapters").json()["data"]]


def test_a_loaded_adapter_is_verified_listed_and_served(client: TestClient, engine: Any, folder: Path) -> None:
    answer = load(client, "green", folder, base_model_name="whatever")
    assert (answer.status_code, "green" in answer.text) == (200, True)
    assert names(client) == ["blue", "green", "red"]
    model = client.get("/v1/models/green").json()
    assert (model["parent"], model["root"]) == ("tiny", str(folder))
    assert client.post("/v1/completions", json={"prompt": "a", "model": "green"}).status_code == 200
    assert engine.commands[0].adapter == AdapterRef(name="green", path=str(folder), revision=1)


def test_loading_the_same_again_changes_nothing(client: TestClient, engine: Any, folder: Path) -> None:
    assert load(client, "green", folder).status_code == 200
    assert load(client, "green", f"{folder}/../green").status_code == 200
    assert client.get("/v1/adapters/green").json()["revision"] == 1


def test_loading_what_was_only_registered_verifies_it(
    client: TestClient, engine: Any, registry: AdapterRegistry, folder: Path
) -> None:
    registry.register(AdapterRef(name="green", path=str(folder)))
    engine.load_error = AdapterInvalidError("broken")
    assert load(client, "green", folder).status_code == 400
    engine.load_error = None
    assert load(client, "green", folder).status_code == 200
    green = client.get("/v1/adapters/green").json()
    assert (green["rank"], green["revision"]) == (8, 0)


def test_another_path_for_a_name_needs_load_inplace(client: TestClient, engine: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert load(client, "green", tmp_path / "one").status_code == 200
    answer = load(client, "green", tmp_path / "two")
    assert (answer.status_code, answer.json()["error"]["param"]) == (409, "lora_path")
    assert answer.headers["x-should-retry"] == "false"
    assert load(client, "green", tmp_path / "two", load_inplace=True).status_code == 200
    assert client.get("/v1/adapters/green").json()["path"] == str(tmp_path / "two")
    assert [(ref.name, ref.revision) for ref in engine.unloaded] == [("green", 1)]


def test_an_adapter_that_breaks_a_rule_is_not_registered(client: TestClient, engine: Any, folder: Path) -> None:
    engine.load_error = AdapterInvalidError("lora_A has rank 4", param="layers.0.q_proj.lora_A.weight")
    answer = load(client, "green", folder)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "layers.0.q_proj.lora_A.weight")
    assert answer.json()["error"]["code"] == "adapter_invalid"
    assert names(client) == ["blue", "red"]


def test_a_failed_reload_leaves_the_old_registration(client: TestClient, engine: Any, folder: Path) -> None:
    load(client, "green", folder)
    engine.load_error = AdapterInvalidError("broken")
    assert load(client, "green", folder, load_inplace=True).status_code == 400
    assert client.get("/v1/adapters/green").json()["revision"] == 1
    assert [ref.revision for ref in engine.unloaded] == [2], "what was refused is not kept by the engine either"


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "a,b", "a\0b", "a\nb", " a", "x" * 256, ".", "..", ".a", "tiny", "\u202eabc"]
)
def test_a_name_that_could_be_mistaken_is_refused(client: TestClient, folder: Path, name: str) -> None:
    answer = load(client, name, folder)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")
    answer = client.post("/v1/adapters", json={"id": name, "path": str(folder)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


@pytest.mark.parametrize("load_inplace", [False, True])
def test_a_path_that_reads_as_a_recipe_is_refused(
    client: TestClient, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_inplace: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("merged:{}", "merged:folder"):
        (tmp_path / path).mkdir()
        answer = load(client, "green", path, load_inplace=load_inplace)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
        assert "kept for merged adapters" in answer.json()["error"]["message"]
        answer = client.post("/v1/adapters", json={"id": "green", "path": path})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path")
    assert engine.loaded == {}


def test_a_recipe_cannot_be_registered_at_the_start() -> None:
    with pytest.raises(InvalidRequestError, match="kept for merged adapters"):
        AdapterRegistry("base").register_all([AdapterRef(name="x", path="merged:folder")])


@pytest.mark.parametrize("path", ["", "/no/such/folder", "a\0b", "x" * 5000, "/etc/passwd"])
def test_a_path_that_is_no_folder_is_refused(client: TestClient, path: str) -> None:
    answer = load(client, "green", path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")


def test_only_folders_below_the_roots_are_loaded(make_client: Any, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "good").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (tmp_path / "root-sibling").mkdir()
    client = make_client(adapter_roots=(root,))
    assert load(client, "good", root / "good").status_code == 200
    for path in (outside, root / ".." / "outside", root / "link", tmp_path / "root-sibling", tmp_path / "missing"):
        answer = load(client, "bad", path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
        assert "operator" in answer.json()["error"]["message"]


def test_unloading_forgets_the_name_at_once(client: TestClient, engine: Any) -> None:
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": "red", "lora_int_id": 3})
    assert answer.status_code == 200
    assert client.delete("/v1/adapters/blue").json() == {"id": "blue", "object": "adapter", "deleted": True}
    assert names(client) == []
    assert [ref.name for ref in engine.unloaded] == ["red", "blue"]
    assert client.post("/v1/completions", json={"prompt": "a", "model": "red"}).status_code == 404


@pytest.mark.parametrize("name", ["none", "../red", "a/b", "x" * 300])
def test_unloading_what_is_not_there_is_a_404(client: TestClient, name: str) -> None:
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "lora_name")
    assert client.delete(f"/v1/adapters/x{name}").status_code == 404
    assert client.get(f"/v1/adapters/x{name}").status_code == 404


def test_a_name_loaded_again_is_another_revision(client: TestClient, engine: Any, folder: Path) -> None:
    load(client, "green", folder)
    client.delete("/v1/adapters/green")
    load(client, "green", folder)
    assert client.get("/v1/adapters/green").json()["revision"] == 2


def test_adapters_show_what_the_engine_knows(client: TestClient, engine: Any, folder: Path) -> None:
    created = client.post("/v1/adapters", json={"id": "green", "path": str(folder)}).json()
    assert (created["id"], created["path"], created["tier"]) == ("green", str(folder), "host")
    assert (created["rank"], created["kind"], created["bytes"], created["pages"]) == (8, "lora", 1024, 2)
    unread = client.get("/v1/adapters/red").json()
    assert (unread["tier"], unread["rank"], unread["identity"]) == ("disk", None, None)
    assert (unread["kind"], unread["num_experts"]) == (None, None)


def test_adapters_and_models_show_kinds_and_experts(client: TestClient, engine: Any, folder: Path) -> None:
    engine.facts = {"kind": "mixlora", "num_experts": 8}
    client.post("/v1/adapters", json={"id": "green", "path": str(folder)})
    listed = {one["id"]: one for one in client.get("/v1/adapters").json()["data"]}
    models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    for green in (listed["green"], client.get("/v1/adapters/green").json(), models["green"]):
        assert (green["kind"], green["num_experts"]) == ("mixlora", 8)
    assert client.get("/v1/models/tiny:green").json()["num_experts"] == 8
    assert (models["red"]["kind"], models["red"]["num_experts"]) == (None, None)
    assert "kind" not in models["tiny"]


def test_adapters_are_listed_page_by_page(client: TestClient) -> None:
    first = client.get("/v1/adapters", params={"limit": 1}).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["blue"], True)
    second = client.get("/v1/adapters", params={"limit": 1, "after": "blue"}).json()
    assert ([one["id"] for one in second["data"]], second["has_more"]) == (["red"], False)
    gone = client.get("/v1/adapters", params={"after": "bluf"}).json()
    assert [one["id"] for one in gone["data"]] == ["red"]


def test_nothing_is_loaded_without_an_engine(client: TestClient, engine: Any, folder: Path) -> None:
    engine.state = "starting"
    assert load(client, "green", folder).status_code == 503
    assert names(client) == ["blue", "red"]


async def test_loads_of_one_name_take_turns_and_a_name_is_invisible_until_verified(
    engine: Any, registry: AdapterRegistry, folder: Path
) -> None:
    engine.load_delay = 0.02
    admin = AdapterAdmin(engine, registry, SourceRules(), RegistryKeeper(registry, None))
    params = ("lora_name", "lora_path")
    loads = [asyncio.create_task(admin.load("green", str(folder), replace=False, params=params)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert registry.get("green") is None
    assert {adapter.ref.revision for adapter in await asyncio.gather(*loads)} == {1}


def test_two_thousand_names_are_registered_and_paged_without_reading_any() -> None:
    registry = AdapterRegistry("base")
    registry.register_all(AdapterRef(name=f"a{at:04}", path=f"/none/{at}") for at in range(2000))
    page, has_more = registry.listed(after="a0998", limit=3)
    assert ([one.ref.name for one in page], has_more) == (["a0999", "a1000", "a1001"], True)
    assert len(list(registry)) == len(registry) == 2000
    registry.check_integrity()


def test_an_adapter_may_be_named_like_a_fine_tune() -> None:
    registry = AdapterRegistry("base")
    registry.register_all([AdapterRef(name="ft:base:org:x:1", path="/x"), AdapterRef(name="base:x", path="/y")])
    assert [registry.resolve(name, None).ref.path for name in ("ft:base:org:x:1", "base:x", "base:base:x")] == [  # type: ignore[union-attr]
        "/x",
        "/y",
        "/y",
    ]
    with pytest.raises(InvalidRequestError):
        registry.register_all([AdapterRef(name="a,b", path="/x")])
