"""The tests' own reference for mixtures says what PEFT says, wherever a mixture is an ordinary adapter in disguise."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PROMPT = [17, 250, 3, 99, 99, 41, 7, 120, 288, 64, 5, 31]
FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def base(checkpoints: Callable[[str], Any]) -> Any:
    return checkpoints("llama-biased")


def peft_logprobs(checkpoint: Any, *folders: Path) -> torch.Tensor:
    """[tokens, vocabulary] of PEFT, under the sum of several adapters where there are several."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(folders))])
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def as_peft(folder: Path, **options: Any) -> Path:
    """The ordinary adapter that a mixture of one expert is."""
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if "lora_" in key:
            name = re.sub(r"^\w+\.|\.experts\.0(?=\.)", "", key)
            tensors[f"base_model.model.model.{name}"] = tensor.clone()
    config = json.loads((folder / "adapter_config.json").read_text())
    inner = peft.LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_dora=config.get("use_dora", False),
        use_rslora=config.get("use_rslora", False),
        target_modules=config["target_modules"],
        task_type="CAUSAL_LM",
    )
    for name, value in options.items():
        setattr(inner, name, value)
    made = folder.with_name(folder.name + "-as-peft")
    made.mkdir()
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt"})
    inner.save_pretrained(str(made))
    return made


def change(folder: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: edit(key, tensor) for key, tensor in load_file(file).items()}, file, {"format": "pt"})


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"magnitudes": [*FFN, "q_proj"]}], ids=["plain", "rslora", "dora"]
)
def test_a_mixlora_of_one_expert_is_a_lora(base: Any, folders: Any, plain: Any, tmp_path: Path, options: Any) -> None:
    folder = folders.write_mixlora(base.model, tmp_path / "a", num_experts=1, top_k=1, **options, attention=["q_proj"])
    answer = plain.plain_answer(base.model, [(folder, 1)], PROMPT)
    agree(answer.logprobs, peft_logprobs(base, as_peft(folder)))


@pytest.mark.parametrize("kind", ["MOLA", "LORAMOE", "METEORA", "TOKENWISE"])
def test_linears_of_one_expert_are_a_lora(base: Any, folders: Any, plain: Any, tmp_path: Path, kind: str) -> None:
    options = {"num_experts": 1} | ({} if kind == "LORAMOE" else {"top_k": 1})
    folder = folders.write(base.model, tmp_path / "a", kind, routed=FFN, plain=ATTENTION, **options)
    answer = plain.plain_answer(base.model, [(folder, 1)], PROMPT)
    agree(answer.logprobs, peft_logprobs(base, as_peft(folder)))


@pytest.mark.parametrize("kind", ["MIXLORA", "MOLA", "LORAMOE", "METEORA", "TOKENWISE"])
def test_experts_that_are_all_alike_are_one_expert(
    base: Any, folders: Any, plain: Any, tmp_path: Path, kind: str
) -> None:
    folder = folders.write(base.model, tmp_path / "a", kind)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(folder, lambda key, _: tensors[re.sub(r"experts\.\d", "experts.0", key)].clone())
    single = folders.write(base.model, tmp_path / "b", kind, num_experts=1, top_k=1)
    change(single, lambda key, tensor: tensors[key] if "lora_" in key else tensor)
    answers = [plain.plain_answer(base.model, [(path, 1)], PROMPT) for path in (folder, single)]
    agree(answers[0].logprobs, answers[1].logprobs)
    assert answers[0].tokens_differ_in_their_routes


def test_a_switch_that_is_certain_serves_its_expert_whole(base: Any, folders: Any, plain: Any, tmp_path: Path) -> None:
    folder = folders.write_mixlora(base.model, tmp_path / "a", routing_strategy="mixlora-switch")
    change(folder, lambda key, tensor: tensor * 1000 if "moe_gate" in key else tensor)
    twin = folders.write_mixlora(base.model, tmp_path / "b", top_k=1)
    answers = [plain.plain_answer(base.model, [(path, 1)], PROMPT) for path in (folder, twin)]
    agree(answers[0].logprobs, answers[1].logprobs)


def test_every_naming_generation_says_the_same(base: Any, folders: Any, plain: Any, tmp_path: Path) -> None:
    paths = [folders.write_mixlora(base.model, tmp_path / name, naming=name) for name in folders.ROUTERS]
    answers = [plain.plain_answer(base.model, [(path, 1)], PROMPT).logprobs for path in paths]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_mix_of_weight_one_each_is_pefts_sum(base: Any, plain: Any, save_peft: Any, tmp_path: Path) -> None:
    a = save_peft(base, tmp_path / "a", seed=1, r=4, target_modules=[*ATTENTION, "lm_head", "up_proj"])
    b = save_peft(base, tmp_path / "b", seed=2, r=2, target_modules=["q_proj", "down_proj"])
    answer = plain.plain_answer(base.model, [(a, 1), (b, 1)], PROMPT)
    agree(answer.logprobs, peft_logprobs(base, a, b))


def test_a_weight_is_a_factor_on_the_scale(base: Any, folders: Any, plain: Any, tmp_path: Path) -> None:
    whole, part = (
        folders.write_routed_linears(base.model, tmp_path / str(alpha), "MOLA", lora_alpha=alpha) for alpha in (8, 2)
    )
    answers = [plain.plain_answer(base.model, mix, PROMPT).logprobs for mix in ([(whole, 0.25)], [(part, 1)])]
    agree(*answers)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"routing_strategy": "mixlora", "top_k": 2}, [(1, 4 / 7), (2, 3 / 7)]),
        ({"routing_strategy": "mixlora", "top_k": 4}, [(1, 0.4), (2, 0.3), (0, 0.2), (3, 0.1)]),
        ({"routing_strategy": "mixlora-switch"}, [(1, 0.4)]),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.65}, [(1, 0.4), (2, 0.3)]),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.75}, [(1, 0.4), (2, 0.3), (0, 0.2)]),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.65, "temperature": 0.5}, [(1, 0.8)]),
        (
            {"routing_strategy": "mixlora-dynamic", "top_p": 0.8, "temperature": 2},
            [(1, 0.2), (2, 0.15), (0, 0.1), (3, 0.05)],
        ),
        ({"peft_type": "LORAMOE"}, [(1, 0.4), (2, 0.3), (0, 0.2), (3, 0.1)]),
    ],
)
def test_routes_worked_out_by_hand(plain: Any, options: Any, expected: list[tuple[int, float]]) -> None:
    logits = torch.tensor([0.2, 0.4, 0.3, 0.1], dtype=torch.float64).log()
    route, margin = plain.choose(logits, {"peft_type": "MIXLORA", **options})
    assert [expert for expert, _ in route] == [expert for expert, _ in expected]
    assert all(math.isclose(weight, by_hand) for (_, weight), (_, by_hand) in zip(route, expected))
    assert margin > 0.04


def test_a_tie_goes_to_the_lowest_index(plain: Any) -> None:
    route, _ = plain.choose(torch.zeros(4), {"peft_type": "MOLA", "top_k": 2})
    assert [expert for expert, _ in route] == [0, 1]
