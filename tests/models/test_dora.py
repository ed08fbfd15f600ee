"""DoRA and rsLoRA adapters of every shape in one batch with ordinary ones and base rows, against PEFT itself.

Magnitudes are real: far from the norms that they start as.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.server.messages import AdapterRef, CallDone, LoadAdapter

VOCAB, NEW_TOKENS = 300, 4
PROMPT_LENGTHS = (25, 7)
OPTIONS: dict[str, dict[str, Any]] = {
    "dora-two-sites": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "dora-all-linear": {"r": 3, "lora_alpha": 9, "target_modules": "all-linear", "use_dora": True},
    "dora-rslora": {"r": 16, "target_modules": ["o_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "dora-head": {"r": 5, "target_modules": ["lm_head", "up_proj"], "use_dora": True},
    "dora-head-alone": {"r": 2, "lora_alpha": 5, "target_modules": ["lm_head"], "use_dora": True},
    "dora-rank-1": {"r": 1, "lora_alpha": 2, "target_modules": ["gate_proj", "k_proj"], "use_dora": True},
    "dora-one-layer": {"r": 8, "target_modules": ["v_proj", "up_proj"], "use_dora": True, "layers_to_transform": [1]},
    "dora-patterns": {
        "r": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "use_dora": True,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 11, "down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "lora": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 7, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj", "lm_head"], "use_rslora": True},
}


@pytest.mark.parametrize("base", ["llama-biased", "llama3", "mistral", "qwen2"])
def test_doras_in_one_batch_with_others_equal_peft(
    base: str, checkpoints: Callable[[str], Any], save_peft: Any, answers: Any, make_engine: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints(base)
    prompts = {
        (name, n): answers.random_prompt(i, n) for i, name in enumerate(["base", *OPTIONS]) for n in PROMPT_LENGTHS
    }
    expected = {
        ("base", n): answers.peft_answer(checkpoint.model, prompts["base", n], NEW_TOKENS) for n in PROMPT_LENGTHS
    }
    for seed, (name, options) in enumerate(OPTIONS.items()):

        def use(model: Any, name: str = name) -> None:
            for n in PROMPT_LENGTHS:
                expected[name, n] = answers.peft_answer(model, prompts[name, n], NEW_TOKENS)

        save_peft(checkpoint, tmp_path / name, seed=seed, use=use, **options)
    driver = make_engine(checkpoint, pages=300, prefill_chunk=16, max_batch_tokens=96)
    for (name, n), prompt in prompts.items():
        ref = None if name == "base" else AdapterRef(name=name, path=str(tmp_path / name))
        driver.generate(f"{name}/{n}", prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    for name, n in prompts:
        answers.assert_same(answers.engine_answer(driver.choices[f"{name}/{n}", 0]), expected[name, n], tolerance=1e-4)
    driver.check_idle()


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]], ids=["alone", "with-head"]
)
def test_dora_on_the_embedding_equals_peft(
    targets: list[str], llama: Any, save_peft: Any, answers: Any, make_engine: Any, tmp_path: Path
) -> None:
    """Its gains are on the embedding's outputs; long and short requests at once."""
    prompts = {n: answers.random_prompt(n, n) for n in (1, 2, 25)}
    expected: dict[int, Any] = {}

    def use(model: Any) -> None:
        expected.update({n: answers.peft_answer(model, prompt, NEW_TOKENS) for n, prompt in prompts.items()})

    folder = save_peft(llama, tmp_path / "dora", use=use, r=4, target_modules=targets, use_dora=True)
    driver = make_engine(llama, pages=100)
    for n, prompt in prompts.items():
        ref = AdapterRef(name="dora", path=str(folder))
        driver.generate(str(n), prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    for n in prompts:
        answers.assert_same(answers.engine_answer(driver.choices[str(n), 0]), expected[n], tolerance=1e-4)


@pytest.fixture
def dora(llama: Any, save_peft: Any, tmp_path: Path) -> Path:
    return save_peft(llama, tmp_path / "dora", r=4, target_modules=["q_proj", "down_proj"], use_dora=True)


def edit_adapter(folder: Path, edit: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(edit(*item) for item in load_file(file).items()), file, {"format": "pt"})


def answer_under(driver: Any, name: str, folder: Path, prompt: list[int], answers: Any) -> Any:
    """Of the folder as it is now."""
    ref = AdapterRef(name=name, path=str(folder), revision=len(driver.choices))
    driver.generate(name, prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    return answers.engine_answer(driver.choices[name, 0])


def test_magnitudes_matter_and_are_those_of_the_file(llama: Any, dora: Path, answers: Any, make_engine: Any) -> None:
    driver, prompt = make_engine(llama, pages=100), answers.random_prompt(1, 20)
    before = answer_under(driver, "before", dora, prompt, answers)
    edit_adapter(dora, lambda key, tensor: (key, tensor * 1.3 if "magnitude" in key else tensor))
    after = answer_under(driver, "after", dora, prompt, answers)
    assert (before[1] - after[1]).abs().max() > 0.1


def test_both_names_of_magnitudes_mean_the_same(llama: Any, dora: Path, answers: Any, make_engine: Any) -> None:
    driver, prompt = make_engine(llama, pages=100), answers.random_prompt(1, 20)
    short = answer_under(driver, "short", dora, prompt, answers)
    edit_adapter(dora, lambda key, tensor: (key + (".weight" if key.endswith("magnitude_vector") else ""), tensor))
    answers.assert_same(answer_under(driver, "long", dora, prompt, answers), short, tolerance=0)


def test_magnitudes_equal_to_the_norms_are_an_ordinary_lora(
    llama: Any, dora: Path, save_peft: Any, answers: Any, plain: Any, make_engine: Any, tmp_path: Path
) -> None:
    adapter = plain.read_folder(dora)
    norms = {}
    for (layer, site), pair in adapter.pairs.items():
        block = llama.model.model.layers[layer]
        parent = "self_attn" if site == "q_proj" else "mlp"
        weight = getattr(getattr(block, parent), site).weight.detach().double()
        key = f"base_model.model.model.layers.{layer}.{parent}.{site}.lora_magnitude_vector"
        norms[key] = (weight + pair.scale * pair.b @ pair.a).norm(dim=1).float()
    edit_adapter(dora, lambda key, tensor: (key, norms.get(key, tensor)))
    lora = save_peft(llama, tmp_path / "lora", r=4, target_modules=["q_proj", "down_proj"])
    tensors = load_file(dora / "adapter_model.safetensors")
    edit_adapter(lora, lambda key, _: (key, tensors[key]))
    driver, prompt = make_engine(llama, pages=100), answers.random_prompt(1, 20)
    found, expected = (answer_under(driver, path.name, path, prompt, answers) for path in (dora, lora))
    answers.assert_same(found, expected, tolerance=2e-5)


def test_the_kind_is_told(llama: Any, dora: Path, make_engine: Any) -> None:
    driver = make_engine(llama, pages=100)
    driver.handle(LoadAdapter(call_id="load", adapter=AdapterRef(name="dora", path=str(dora))))
    driver.run()
    assert isinstance(driver.answers["load"], CallDone)
    assert driver.answers["load"].adapter.kind == "dora"
