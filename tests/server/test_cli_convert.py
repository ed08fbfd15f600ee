from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from loraplex.server.cli_adapters import adapters_app

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HIDDEN = 32


def convert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(adapters_app, ["convert", *map(str, arguments)], catch_exceptions=False)


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(adapters_app, ["verify", *map(str, arguments)], catch_exceptions=False)


def one_error(result: Result) -> str:
    """The one line that tells of an error."""
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its weights."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def save_peft(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter with random weights, or as it was initialised, as PEFT does."""

    def save(name: str, seed: int = 0, **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            options = {"r": 4, "target_modules": ["q_proj"], **options}
            model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**options))
            for key, parameter in model.named_parameters():
                if "lora_" in key and "init_lora_weights" not in options:
                    parameter.data.normal_()
            model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def mixlora(tmp_path: Path) -> Path:
    """An adapter of the oldest naming, pickled."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        start = f"mixlora.layers.{layer}"
        tensors[f"{start}.gate.weight"] = torch.randn(3, HIDDEN)
        tensors[f"{start}.self_attn.q_proj.lora_A.weight"] = torch.randn(4, HIDDEN)
        tensors[f"{start}.self_attn.q_proj.lora_B.weight"] = torch.randn(HIDDEN, 4)
        for expert in range(3):
            tensors[f"{start}.experts.{expert}.w3_proj.lora_A.weight"] = torch.randn(4, HIDDEN)
            tensors[f"{start}.experts.{expert}.w3_proj.lora_B.weight"] = torch.randn(48, 4)
    folder = tmp_path / "mixlora"
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    config = {"routing_strategy": "mixtral", "r": 4, "lora_alpha": 8, "num_experts": 3, "top_k": 2}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_mixlora_is_converted_without_a_base(mixlora: Path, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    assert "adapter_model.bin" in one_error(convert(mixlora, out))
    result = convert(mixlora, out, "--allow-bin")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"converted: {out}: mixlora, rank 4, 3 experts, q_proj up_proj")
    assert "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight" in load_file(out / WEIGHTS)
    assert stat.S_IMODE((out / WEIGHTS).stat().st_mode) == 0o644
    assert verify(out, "--base", base).exit_code == 0


def test_a_result_that_does_not_fit_the_base_is_not_written(mixlora: Path, tmp_path: Path, base: Path) -> None:
    tensors = torch.load(mixlora / "adapter_model.bin", weights_only=True)
    tensors["mixlora.layers.0.gate.weight"] = torch.zeros(3, HIDDEN + 1)
    torch.save(tensors, mixlora / "adapter_model.bin")
    error = one_error(convert(mixlora, tmp_path / "out", "--allow-bin", "--base", base))
    assert "mixlora.layers.0.mlp.moe_gate.weight" in error
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_needs_force(mixlora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(mixlora, out, "--allow-bin").exit_code == 0
    assert f"{out}: exists already" in one_error(convert(mixlora, out, "--allow-bin"))
    assert convert(mixlora, out, "--allow-bin", "--force").exit_code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert "not an adapter's folder" in one_error(convert(mixlora, tmp_path / "other", "--allow-bin", "--force"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_becomes_plain(
    save_peft: Callable[..., Path], base: Path, tmp_path: Path, init: str
) -> None:
    folder, out = save_peft(init, init_lora_weights=init), tmp_path / "out"
    assert "init_lora_weights" in one_error(verify(folder, "--base", base))
    assert "--base" in one_error(convert(folder, out))
    result = convert(folder, out, "--base", base)
    assert result.exit_code == 0
    assert "lora, rank 8, q_proj" in result.stdout
    assert verify(out, "--base", base).exit_code == 0


def test_the_start_of_an_adapter_stands_for_the_base(save_peft: Callable[..., Path], tmp_path: Path) -> None:
    folder, initial = save_peft("trained", init_lora_weights="pissa_niter_2"), save_peft("initial")
    assert "--initial" in one_error(convert(folder, tmp_path / "out"))
    assert convert(folder, tmp_path / "out", "--initial", initial).exit_code == 0


def test_adapters_and_a_router_become_a_tokenwise_mixture(
    save_peft: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    folders = [save_peft(f"adapter-{seed}", seed) for seed in range(3)]
    router, out = tmp_path / "router.safetensors", tmp_path / "out"
    save_file({"router": torch.randn(3, HIDDEN)}, router)
    assert "--base" in one_error(convert(*folders, out, "--router", router))
    result = convert(*folders, out, "--router", router, "--base", base, "--top-k", "1")
    assert result.exit_code == 0
    assert "tokenwise, rank 4, 3 experts, q_proj" in result.stdout
    assert json.loads((out / CONFIG).read_text())["top_k"] == 1
    assert verify(out, "--base", base).exit_code == 0
    assert "base" in one_error(verify(out))


def test_adapters_and_gates_become_a_meteora(save_peft: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    folders = [save_peft(f"adapter-{seed}", seed) for seed in range(2)]
    gates, out = tmp_path / "model.safetensors", tmp_path / "out"
    key = "base_model.model.model.layers.{}.self_attn.q_proj.moe_gate.weight"
    save_file({key.format(layer): torch.randn(2, HIDDEN) for layer in range(2)}, gates)
    assert "--base" in one_error(convert(*folders, out, "--gates", gates))
    result = convert(*folders, out, "--gates", gates, "--base", base)
    assert result.exit_code == 0
    assert "meteora, rank 4, 2 experts, q_proj" in result.stdout
    assert verify(out, "--base", base).exit_code == 0


def test_several_adapters_need_to_know_what_they_become(save_peft: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_peft("one")
    error = one_error(convert(folder, folder, tmp_path / "out"))
    assert "--gates" in error
    assert "--router" in error


def test_conversions_exclude_each_other(save_peft: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_peft("one")
    error = one_error(convert(folder, tmp_path / "out", "--gates", tmp_path, "--router", tmp_path))
    assert "exclude each other" in error


def test_a_folder_that_is_no_adapter_is_one_line(tmp_path: Path) -> None:
    assert CONFIG in one_error(convert(tmp_path, tmp_path / "out"))
    assert "cannot be read" in one_error(convert(tmp_path / "nothing", tmp_path / "out"))
