"""Adapters that come and go while the server runs, and adapters that must not come at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.demo.assets import adapters_folder


@pytest.fixture(autouse=True)
def goes_on_serving(demo: Any) -> Any:
    yield
    assert demo.ask("loraplex", "upper") == "LORAPLEX"


def named(demo: Any, name: str) -> dict[str, Any]:
    return dict(demo.get(f"/v1/adapters/{name}").json())


def first_key(tensors: dict[str, Any]) -> str:
    return min(tensors)


def test_an_adapter_is_loaded_used_listed_and_unloaded(demo: Any, load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    assert load("backwards", folder.path).status_code == 200
    assert named(demo, "backwards")["tier"] in {"host", "pool"}
    assert demo.ask("adapter", "backwards") == "retpada"
    listed = {one["id"]: one for one in demo.get("/v1/adapters").json()["data"]}
    assert listed["backwards"] == named(demo, "backwards")
    assert listed["backwards"]["tier"] == "pool"
    assert listed["backwards"]["path"] == str(folder.path)
    assert listed["backwards"]["parent"] == "loraplex-demo"
    assert listed["backwards"]["pages"] > 0
    assert "backwards" in demo.model_names()

    assert demo.post("/v1/unload_lora_adapter", {"lora_name": "backwards"}).status_code == 200
    missing = demo.post("/v1/chat/completions", {"model": "backwards", "messages": [{"role": "user", "content": "a"}]})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert demo.get("/v1/adapters/backwards").status_code == 404
    assert demo.post("/v1/unload_lora_adapter", {"lora_name": "backwards"}).status_code == 404


def test_our_own_routes_do_the_same(demo: Any, copy_adapter: Any) -> None:
    made = demo.post("/v1/adapters", {"id": "mine", "path": str(copy_adapter("spell").path)})
    assert (made.status_code, made.json()["id"]) == (200, "mine")
    assert demo.ask("kernel", "mine") == "k-e-r-n-e-l"
    assert demo.request("DELETE", "/v1/adapters/mine").json() == {"id": "mine", "object": "adapter", "deleted": True}
    assert demo.get("/v1/adapters/mine").status_code == 404


def test_loading_the_same_again_is_no_error_and_another_path_is_a_conflict(load: Any, copy_adapter: Any) -> None:
    first, second = copy_adapter("upper", "first"), copy_adapter("spell", "second")
    assert [load("twice", first.path).status_code for _ in range(2)] == [200, 200]
    conflict = load("twice", second.path)
    assert (conflict.status_code, conflict.json()["error"]["param"]) == (409, "lora_path")
    assert conflict.headers["x-should-retry"] == "false"


def test_loading_in_place_changes_the_answers(demo: Any, load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    assert load("changing", folder.path).status_code == 200
    assert demo.ask("kernel", "changing") == "lenrek"
    before = named(demo, "changing")
    folder.become("spell")
    assert demo.ask("kernel", "changing") == "lenrek"
    assert load("changing", folder.path, load_inplace=True).status_code == 200
    assert demo.ask("kernel", "changing") == "k-e-r-n-e-l"
    after = named(demo, "changing")
    assert after["identity"] != before["identity"]
    assert after["revision"] > before["revision"]


def test_a_failed_load_in_place_leaves_the_old_adapter(demo: Any, load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    assert load("steady", folder.path).status_code == 200
    folder.weights.write_bytes(b"nothing")
    assert load("steady", folder.path, load_inplace=True).status_code == 400
    assert demo.ask("kernel", "steady") == "lenrek"


def pool_hits(demo: Any) -> float:
    return float(demo.metrics().value("loraplex_adapter_lookups_total", tier="pool", result="hit"))


def test_two_names_of_the_same_bytes_share_their_pages(demo: Any, load: Any, wait_until: Callable[..., bool]) -> None:
    hits = partial(pool_hits, demo)
    names = ("spell", "spell", "twin")
    assert load("twin", adapters_folder() / "spell").status_code == 200
    seen = []
    for name in names:
        before = hits()
        assert demo.ask("kernel", name) == "k-e-r-n-e-l"
        # The first use may load it; all that follow find it, whatever it is called.
        assert not seen or wait_until(lambda before=before: hits() > before)
        seen.append(named(demo, name)["identity"])
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("name", "path", "param"),
    [
        ("none", "/no/such/folder", "lora_path"),
        ("none", "", "lora_path"),
        ("none", "a\0b", "lora_path"),
        ("none", "~/adapters", "lora_path"),
        ("none", str(adapters_folder() / "upper" / "adapter_config.json"), "lora_path"),
        ("none", str(adapters_folder()), "adapter_config.json"),
        ("../upper", str(adapters_folder() / "upper"), "lora_name"),
        ("..", str(adapters_folder() / "upper"), "lora_name"),
        ("a,b", str(adapters_folder() / "upper"), "lora_name"),
        ("", str(adapters_folder() / "upper"), "lora_name"),
        ("x" * 300, str(adapters_folder() / "upper"), "lora_name"),
        ("loraplex-demo", str(adapters_folder() / "upper"), "lora_name"),
    ],
)
def test_bad_names_and_paths_are_refused(load: Any, name: str, path: str, param: str) -> None:
    answer = load(name, path)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_name_with_a_path_in_it_reaches_no_file(demo: Any) -> None:
    for trick in ("..%2F..%2Fetc", "%2Fetc%2Fpasswd", "../../etc/passwd"):
        answer = demo.get(f"/v1/adapters/{trick}")
        assert answer.status_code == 404
        assert "root:" not in answer.text


def truncate(folder: Any) -> str:
    folder.weights.write_bytes(folder.weights.read_bytes()[:-1000])
    return "adapter_model.safetensors"


def scramble_header(folder: Any) -> str:
    folder.weights.write_bytes(b"\xff" * 4096)
    return "adapter_model.safetensors"


def poison(folder: Any) -> str:
    keys: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        keys.append(first_key(tensors))
        tensors[keys[0]][0, 0] = math.nan

    folder.edit_tensors(edit)
    return keys[0]


def of_another_base(folder: Any) -> str:
    keys: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        keys.append(min(key for key in tensors if "lora_A" in key))
        tensors[keys[0]] = tensors[keys[0]][:, :-8].copy()

    folder.edit_tensors(edit)
    return keys[0]


def add_a_stranger(folder: Any) -> str:
    key = "base_model.model.model.layers.0.self_attn.w_proj.lora_A.weight"
    folder.edit_tensors(lambda tensors: tensors.update({key: tensors[first_key(tensors)]}))
    return key


def drop_one_of_a_pair(folder: Any) -> str:
    keys: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        keys.append(min(key for key in tensors if "lora_B" in key))
        del tensors[keys[0]]

    folder.edit_tensors(edit)
    return keys[0].partition(".lora_B")[0]


def leave_only_a_bin(folder: Any) -> str:
    folder.weights.rename(folder.path / "adapter_model.bin")
    return "adapter_model.bin"


def remove_the_weights(folder: Any) -> str:
    folder.weights.unlink()
    return "adapter_model.safetensors"


def remove_the_config(folder: Any) -> str:
    (folder.path / "adapter_config.json").unlink()
    return "adapter_config.json"


def spoil_the_config(folder: Any) -> str:
    (folder.path / "adapter_config.json").write_text("{", encoding="utf-8")
    return "adapter_config.json"


def ask_for_dora(folder: Any) -> str:
    folder.edit_config(use_dora=True)
    return "use_dora"


def lie_about_the_rank(folder: Any) -> str:
    folder.edit_config(r=folder.config["r"] + 3, rank_pattern={})
    return "rank"


def ask_for_another_family(folder: Any) -> str:
    folder.edit_config(peft_type="IA3")
    return "peft_type"


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        scramble_header,
        poison,
        of_another_base,
        add_a_stranger,
        drop_one_of_a_pair,
        leave_only_a_bin,
        remove_the_weights,
        remove_the_config,
        spoil_the_config,
        ask_for_dora,
        lie_about_the_rank,
        ask_for_another_family,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_spoilt_adapter_is_refused_by_the_name_of_its_fault(
    demo: Any, load: Any, copy_adapter: Any, spoil: Callable[[Any], str]
) -> None:
    folder = copy_adapter("caesar")
    fault = spoil(folder)
    answer = load("spoilt", folder.path)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "adapter_invalid")
    assert fault in f"{error['message']} {error['param']}"
    assert error["param"]
    assert demo.get("/v1/adapters/spoilt").status_code == 404


def test_a_refused_adapter_may_be_mended_and_loaded(demo: Any, load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("caesar")
    poison(folder)
    assert load("mended", folder.path).status_code == 400
    folder.become("spell")
    assert load("mended", folder.path).status_code == 200
    assert demo.ask("kernel", "mended") == "k-e-r-n-e-l"


def test_links_out_of_an_adapter_folder_are_not_followed_to_secrets(
    load: Any, copy_adapter: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "swordfish"}', encoding="utf-8")
    folder = copy_adapter("caesar")
    (folder.path / "adapter_config.json").unlink()
    (folder.path / "adapter_config.json").symlink_to(secret)
    answer = load("spy", folder.path)
    assert "swordfish" not in answer.text
