"""The demo's tasks, its split, and the files that it ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from loraplex.server.demo import assets
from loraplex.server.demo.tasks import (
    BASE_ANSWER,
    TASKS,
    Task,
    draw_input,
    exact_match,
    seeded,
    split_of,
    task_named,
    unseen_inputs,
)

MEGABYTE = 1_000_000

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
every_adapter = pytest.mark.parametrize("folder", assets.demo_adapters().values(), ids=lambda folder: folder.name)


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("upper", "hello", "HELLO"),
        ("reverse", "hello", "olleh"),
        ("sort", "hello", "ehllo"),
        ("caesar", "xyzab", "abcde"),
        ("echo", "hello", "hello hello"),
        ("spell", "hello", "h-e-l-l-o"),
        ("devowel", "hello", "hll"),
        ("count", "hello", "5"),
        ("add", "347+5", "352"),
        ("emoji", "lora", "🔴🔵🔴🔵"),
    ],
)
def test_each_task_has_the_answer_that_its_name_promises(name: str, question: str, answer: str) -> None:
    assert task_named(name).answer(question) == answer


def test_every_task_is_checked_by_hand_once() -> None:
    names = {task.name for task in TASKS}
    assert len(names) == len(TASKS) >= 8


@every_task
def test_drawn_inputs_stay_on_their_side_of_the_split(task: Task) -> None:
    rng = seeded("split", task.name)
    train = {draw_input(task, rng, "train") for _ in range(500)}
    assert all(split_of(text) == "train" for text in train)
    assert train.isdisjoint(unseen_inputs(task, 200))


@every_task
def test_unseen_inputs_differ_from_each_other_and_repeat_with_their_seed(task: Task) -> None:
    inputs = unseen_inputs(task, 200, seed=3)
    assert len(set(inputs)) == 200
    assert inputs == unseen_inputs(task, 200, seed=3)
    assert inputs != unseen_inputs(task, 200, seed=4)


@every_task
def test_no_right_answer_is_empty_or_what_the_base_says(task: Task) -> None:
    answers = [task.answer(text) for text in unseen_inputs(task, 200)]
    assert all(answers)
    assert BASE_ANSWER not in answers


def test_the_same_question_has_a_different_answer_from_every_word_task() -> None:
    words = [task for task in TASKS if task.name != "add"]
    assert len({task.answer("memory") for task in words}) == len(words)


def test_exact_match_counts_only_equal_answers() -> None:
    upper = task_named("upper")
    assert exact_match(upper, ["ab", "cd", "ef", "gh"], ["AB", "cd", "EF ", "GH"]) == 0.5


def test_exact_match_refuses_a_missing_answer() -> None:
    with pytest.raises(ValueError, match="shorter"):
        exact_match(task_named("upper"), ["ab", "cd"], ["AB"])


def test_an_unknown_task_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        task_named("translate")


def test_there_is_one_adapter_folder_per_task_one_per_other_kind_and_no_other() -> None:
    folders = sorted(path.name for path in assets.adapters_folder().iterdir())
    assert sorted(task.name for task in TASKS) == sorted(assets.demo_adapters())
    assert folders == sorted([*assets.demo_adapters(), *assets.kind_adapters()])


def test_samples_name_every_adapter_and_the_base_once() -> None:
    samples = assets.samples()
    assert [sample.adapter for sample in samples] == [*assets.demo_adapters(), None]
    assert samples[-1].answer == BASE_ANSWER


@every_adapter
def test_an_adapter_folder_holds_its_settings_and_low_rank_matrices_alone(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "loraplex-demo"
    with safe_open(folder / "adapter_model.safetensors", "np") as tensors:
        assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors.keys())  # noqa: SIM118


def test_adapters_are_of_mixed_ranks_targets_and_scalings() -> None:
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in assets.demo_adapters().values()]
    assert {config["r"] for config in configs} >= {1, 2, 4, 8, 16}
    assert len({tuple(config["target_modules"]) for config in configs}) >= 5
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] for config in configs)
    assert any(config["layers_to_transform"] for config in configs)


def test_the_files_are_small_enough_for_a_wheel() -> None:
    shipped = [path for folder in _folders() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 10 * MEGABYTE


def test_no_shipped_file_names_a_path_of_the_machine_that_made_it() -> None:
    texts = [path for folder in _folders() for path in folder.rglob("*") if path.suffix in {".json", ".jinja"}]
    assert texts
    for path in texts:
        assert not any(root in path.read_text() for root in ("/home", "/tmp", "/work", "/root", "/Users", "C:\\"))


def test_the_base_is_a_small_llama_with_grouped_heads_and_tied_embeddings() -> None:
    config = json.loads((assets.base_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] >= 512
    with safe_open(assets.base_folder() / "model.safetensors", "np") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
    parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert 2_000_000 <= parameters <= 10_000_000


def test_questions_and_paths_are_known_without_importing_torch() -> None:
    code = "import sys, loraplex.server.demo.assets; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _folders() -> tuple[Path, Path]:
    return assets.base_folder(), assets.adapters_folder()
