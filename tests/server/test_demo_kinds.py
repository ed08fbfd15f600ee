"""The table of the demo's adapters of other kinds, and the files that they ship."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loraplex.server.demo import assets
from loraplex.server.demo.kinds import KINDS, KindAdapter, covered, kind_named
from loraplex.server.demo.tasks import TASKS, task_named

NUM_LAYERS = 5
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HALVES = ("lora_A", "lora_B")

every_kind = pytest.mark.parametrize("adapter", KINDS, ids=lambda adapter: adapter.name)


def read_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((assets.kind_adapters()[name] / "adapter_config.json").read_text())
    return config


def read_shapes(name: str) -> dict[str, list[int]]:
    """The shape of every tensor of an adapter, all of which must be in float32."""
    with safe_open(assets.kind_adapters()[name] / "adapter_model.safetensors", "np") as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        assert {part.get_dtype() for part in slices.values()} == {"F32"}
        return {key: part.get_shape() for key, part in slices.items()}


def expert_keys(site: str, experts: int) -> set[str]:
    return {f"{site}.experts.{expert}.{half}.weight" for expert in range(experts) for half in HALVES}


def test_there_is_an_adapter_of_each_other_kind() -> None:
    assert {adapter.kind for adapter in KINDS} == {"MIXLORA", "TOKENWISE", "DORA"}
    assert len({adapter.name for adapter in KINDS} | {task.name for task in TASKS}) == len(KINDS) + len(TASKS)


def test_the_two_mixtures_cover_four_tasks_each_and_none_in_common() -> None:
    mixlora, tokenwise = kind_named("words-mixlora").tasks, kind_named("words-tokenwise").tasks
    assert len(mixlora) == len(tokenwise) == 4
    assert len({*mixlora, *tokenwise}) == 8


def test_an_adapter_of_several_tasks_is_asked_for_one_by_a_system_message() -> None:
    assert kind_named("words-mixlora").messages(task_named("spell"), "kernel") == [
        {"role": "system", "content": "spell"},
        {"role": "user", "content": "kernel"},
    ]


def test_an_adapter_of_one_task_is_asked_without_a_system_message() -> None:
    question = [{"role": "user", "content": "kernel"}]
    assert kind_named("reverse-dora").messages(task_named("reverse"), "kernel") == question


@every_kind
def test_a_task_that_an_adapter_does_not_cover_is_refused_with_those_that_it_does(adapter: KindAdapter) -> None:
    with pytest.raises(ValueError, match=f"task: .*'add'; it does {', '.join(adapter.tasks)}"):
        adapter.messages(task_named("add"), "1+1")


def test_an_unknown_kind_of_adapter_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        kind_named("upper")


def test_covered_tasks_are_those_of_the_table() -> None:
    assert [task.name for task in covered(kind_named("reverse-dora"))] == ["reverse"]


@every_kind
def test_the_folder_of_another_kind_holds_two_files_that_all_may_read(adapter: KindAdapter) -> None:
    files = sorted(assets.kind_adapters()[adapter.name].iterdir())
    assert [path.name for path in files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    assert read_config(adapter.name)["base_model_name_or_path"] == "loraplex-demo"


def test_the_mixlora_adapter_is_in_the_modern_published_naming() -> None:
    config, shapes = read_config("words-mixlora"), read_shapes("words-mixlora")
    assert config["peft_type"] == "MIXLORA"
    assert config["routing_strategy"] == "mixlora"
    assert config["act_fn"] == "silu"
    wanted: set[str] = set()
    for layer in (f"mixlora.layers.{at}" for at in range(NUM_LAYERS)):
        wanted.add(f"{layer}.mlp.moe_gate.weight")
        wanted |= {f"{layer}.self_attn.{name}.{half}.weight" for name in ATTENTION for half in HALVES}
        for name in MLP:
            wanted |= expert_keys(f"{layer}.mlp.{name}", config["num_experts"])
    assert shapes.keys() == wanted
    assert shapes["mixlora.layers.0.mlp.moe_gate.weight"] == [config["num_experts"], 192]


def test_the_experts_of_the_mixlora_adapter_have_a_rank_of_their_own() -> None:
    config, shapes = read_config("words-mixlora"), read_shapes("words-mixlora")
    assert config["expert_lora"]["r"] != config["r"]
    assert shapes["mixlora.layers.4.mlp.down_proj.experts.3.lora_A.weight"] == [config["expert_lora"]["r"], 576]
    assert shapes["mixlora.layers.4.mlp.down_proj.experts.3.lora_B.weight"] == [192, config["expert_lora"]["r"]]
    assert shapes["mixlora.layers.4.self_attn.k_proj.lora_A.weight"] == [config["r"], 192]
    assert shapes["mixlora.layers.4.self_attn.k_proj.lora_B.weight"] == [64, config["r"]]


def test_the_tokenwise_adapter_has_one_router_and_experts_on_every_linear() -> None:
    config, shapes = read_config("words-tokenwise"), read_shapes("words-tokenwise")
    assert config["peft_type"] == "TOKENWISE"
    assert config["top_k"] < config["num_experts"]
    wanted = {"tokenwise.router.weight"}
    for layer in (f"tokenwise.layers.{at}" for at in range(NUM_LAYERS)):
        for site in (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)):
            wanted |= expert_keys(f"{layer}.{site}", config["num_experts"])
    assert shapes.keys() == wanted
    assert shapes["tokenwise.router.weight"] == [config["num_experts"], 192]
    assert shapes["tokenwise.layers.2.mlp.up_proj.experts.0.lora_A.weight"] == [config["r"], 192]


def test_the_dora_adapter_has_a_magnitude_beside_each_pair() -> None:
    config, shapes = read_config("reverse-dora"), read_shapes("reverse-dora")
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    pairs = {key for key in shapes if re.search(r"\.lora_[AB]\.weight$", key)}
    magnitudes = {key.split(".lora_")[0] for key in shapes.keys() - pairs}
    assert magnitudes == {key.split(".lora_")[0] for key in pairs}
    assert all("lora_magnitude_vector" in key for key in shapes.keys() - pairs)


def test_the_table_of_kinds_is_known_without_importing_torch() -> None:
    code = "import sys, loraplex.server.demo.kinds; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kind_adapters_lie_beside_the_plain_ones() -> None:
    folders: list[Path] = list(assets.kind_adapters().values())
    assert [folder.name for folder in folders] == [adapter.name for adapter in KINDS]
    assert {folder.parent for folder in folders} == {assets.adapters_folder()}
