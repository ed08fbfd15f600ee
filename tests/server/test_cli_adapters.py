from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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

from loraplex.memory.adapter_files import read_adapter
from loraplex.server.cli_adapters import adapters_app
from loraplex.server.errors import AdapterInvalidError, OverloadedError
from loraplex.server.traits import read_traits

NOWHERE = "http://127.0.0.1:9"
WEIGHTS = "adapter_model.safetensors"


def loraplex(*arguments: str | Path) -> Result:
    return CliRunner().invoke(adapters_app, [str(argument) for argument in arguments], catch_exceptions=False)


def one_error(result: Result) -> str:
    """The one line that tells of an error."""
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAPLEX_URL", "LORAPLEX_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``base`` and, in ``adapters``, a ``small`` adapter and one of ``mixed`` ranks, saved by their libraries."""
    root = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(root / "base")
    small = {"r": 4, "target_modules": ["q_proj"]}
    mixed = {"r": 8, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in {"small": small, "mixed": mixed}.items():
            torch.manual_seed(0)
            model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(**options))
            model.save_pretrained(root / "adapters" / name)
    return root


@pytest.fixture
def small(saved: Path) -> Path:
    return saved / "adapters" / "small"


@pytest.fixture
def base(saved: Path) -> Path:
    return saved / "base"


@pytest.fixture
def broken(small: Path, tmp_path: Path) -> Path:
    """A copy of the small adapter with a value that is no number."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((small / "adapter_config.json").read_bytes())
    tensors = load_file(small / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_list_shows_a_table_of_what_the_server_knows(serve: Callable[..., Any], engine: Any) -> None:
    url = serve().url
    loaded = loraplex("load", "green", Path(__file__).parent, "--url", url)
    assert loaded.stdout.startswith(f"loaded green: rank 8, 2 pages, {Path(__file__).parent}")
    result = loraplex("list", "--url", url)
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["name", "kind", "rank", "state", "tier", "pages", "path"],
        ["blue", "-", "-", "registered", "disk", "-", "/adapters/blue"],
        ["green", "lora", "8", "ready", "host", "2", str(Path(__file__).parent)],
        ["red", "-", "-", "registered", "disk", "-", "/adapters/red"],
    ]


def test_list_prints_json(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", serve().url)
    listed = json.loads(loraplex("list", "--json").stdout)
    assert [(one["id"], one["tier"], one["rank"]) for one in listed] == [("blue", "disk", None), ("red", "disk", None)]


def test_load_makes_paths_of_this_machine_absolute(
    serve: Callable[..., Any], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert loraplex("load", "mine", "mine", "--url", serve().url).exit_code == 0
    assert engine.loaded["mine"].path == str(tmp_path / "mine")


def test_load_replaces_only_when_told_to(serve: Callable[..., Any], tmp_path: Path) -> None:
    url = serve().url
    error = one_error(loraplex("load", "red", tmp_path, "--url", url))
    assert "'red' is loaded from another path" in error
    assert loraplex("load", "red", tmp_path, "--replace", "--url", url).exit_code == 0


def test_load_tells_why_an_adapter_is_refused(serve: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    engine.load_error = AdapterInvalidError("key 'a.b': expected [4, 32],\nfound [4, 31]", param="a.b")
    error = one_error(loraplex("load", "green", tmp_path, "--url", serve().url))
    assert error == "error: key 'a.b': expected [4, 32], found [4, 31]"


def test_unload_takes_an_adapter_away(serve: Callable[..., Any], engine: Any) -> None:
    url = serve().url
    assert loraplex("unload", "red", "--url", url).stdout == "unloaded red\n"
    assert [ref.name for ref in engine.unloaded] == ["red"]
    assert "'red' does not exist" in one_error(loraplex("unload", "red", "--url", url))


@pytest.mark.parametrize("command", [("list",), ("load", "a", "b"), ("unload", "a")])
def test_a_server_that_is_not_there_is_one_line(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.clients.client.sleep", lambda _: None)
    error = one_error(loraplex(*command, "--url", NOWHERE))
    assert NOWHERE in error
    assert "'loraplex serve'" in error


def test_a_bad_url_is_one_line_that_says_what_is_accepted() -> None:
    assert "accepted is http://HOST:PORT" in one_error(loraplex("list", "--url", "localhost:8000"))


def test_a_missing_key_is_one_line_that_names_the_flag(serve: Callable[..., Any]) -> None:
    url = serve(api_keys=("secret",)).url
    assert "--api-key" in one_error(loraplex("list", "--url", url))
    assert loraplex("list", "--url", url, "--api-key", "secret").exit_code == 0


def test_an_overloaded_server_is_one_line(
    serve: Callable[..., Any], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.clients.client.sleep", lambda _: None)
    engine.load_error = OverloadedError("The queue is full.")
    assert one_error(loraplex("load", "green", tmp_path, "--url", serve().url)) == "error: The queue is full."


def test_inspect_tells_what_a_folder_holds(small: Path) -> None:
    result = loraplex("inspect", small, "--json")
    facts = json.loads(result.stdout)
    assert (facts["kind"], facts["rank"], facts["targets"], facts["num_tensors"]) == ("lora", 4, ["q_proj"], 4)
    assert facts["num_bytes"] == (small / WEIGHTS).stat().st_size
    assert facts["dtype"] == "float32"
    assert len(facts["identity"]) == 64


def test_inspect_tells_the_identity_that_a_server_would(saved: Path, base: Path) -> None:
    shape = read_traits(LlamaConfig.from_pretrained(base)).base_shape
    for folder in (saved / "adapters").iterdir():
        facts = json.loads(loraplex("inspect", folder, "--json").stdout)
        assert facts["identity"] == read_adapter(folder, shape).identity


def test_inspect_with_a_base_tells_ranks_and_pages(saved: Path, base: Path) -> None:
    facts = json.loads(loraplex("inspect", saved / "adapters" / "mixed", "--base", base, "--json").stdout)
    assert facts["ranks"] == [2, 8]
    # Rows of 128 elements: 2 * 2 of q_proj and 2 * 8 of down_proj; a page holds 16 * 2 * 2 * 8 elements.
    assert facts["pages"] == 5
    larger = loraplex("inspect", saved / "adapters" / "mixed", "--base", base, "--page-tokens", "64", "--json")
    assert json.loads(larger.stdout)["pages"] == 2


def test_inspect_prints_a_line_per_fact(small: Path, base: Path) -> None:
    lines = loraplex("inspect", small, "--base", base).stdout.splitlines()
    facts = dict(line.strip().split(maxsplit=1) for line in lines)
    assert (facts["kind"], facts["rank"], facts["pages"]) == ("lora", "4", "2")
    assert facts["path"] == str(small)


def test_inspect_of_no_adapter_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in one_error(loraplex("inspect", tmp_path / "nothing"))
    assert "adapter_config.json" in one_error(loraplex("inspect", tmp_path))


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A MixLoRA of the package's naming with three experts, two of four layers, and DoRA if its test says so."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        start = f"mixlora.layers.{layer}"
        tensors[f"{start}.gate.weight"] = torch.randn(3, 32)
        for expert in range(3):
            tensors[f"{start}.experts.{expert}.up_proj.lora_A.weight"] = torch.randn(2 + layer, 32)
            tensors[f"{start}.experts.{expert}.up_proj.lora_B.weight"] = torch.randn(48, 2 + layer)
    folder = tmp_path / "mixture"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        "r": 2,
        "lora_alpha": 4,
        "num_experts": 3,
        "top_k": 2,
    }
    pattern = {"layers.1.mlp.up_proj": 3}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))
    return folder


def test_inspect_tells_experts_and_how_they_are_chosen(mixture: Path, base: Path) -> None:
    facts = json.loads(loraplex("inspect", mixture, "--json").stdout)
    assert (facts["kind"], facts["num_experts"], facts["top_k"]) == ("mixlora", 3, 2)
    assert (facts["routing"], facts["scope"]) == ("top-k", "ffn")
    assert facts["experts_by_layer"] == {"0": 3, "1": 3}
    assert facts["ranks"] == [2, 3]
    shape = read_traits(LlamaConfig.from_pretrained(base)).base_shape
    assert facts["identity"] == read_adapter(mixture, shape).identity
    shown = dict(re.split(r"\s{2,}", line.strip()) for line in loraplex("inspect", mixture).stdout.splitlines())
    assert (shown["experts"], shown["routing"], shown["scope"]) == ("3", "top-k", "ffn")
    assert shown["experts by layer"] == "0:3 1:3"


def test_inspect_of_plain_lora_says_nothing_of_experts(small: Path) -> None:
    assert "experts" not in loraplex("inspect", small).stdout


def test_inspect_tells_the_pages_of_experts_and_routers(mixture: Path, base: Path) -> None:
    facts = json.loads(loraplex("inspect", mixture, "--base", base, "--json").stdout)
    # Rows of 128 elements in the larger layer: 3 experts with 3 of A and 3 of B, and 3 of the router; a page holds 4.
    assert facts["pages"] == 6
    assert facts["warnings"] == []


def test_values_are_checked_in_the_dtype_that_is_served(small: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(small, folder)
    save_file(
        {key: torch.full_like(tensor, 1e5) for key, tensor in load_file(small / WEIGHTS).items()}, folder / WEIGHTS
    )
    assert loraplex("verify", folder, "--base", base, "--dtype", "bfloat16").exit_code == 0
    assert "float16" in one_error(loraplex("verify", folder, "--base", base, "--dtype", "float16"))
    assert loraplex("verify", folder, "--base", base, "--dtype", "float8").exit_code == 2


def test_verify_without_a_base_makes_every_other_check(mixture: Path, small: Path, broken: Path) -> None:
    result = loraplex("verify", mixture)
    assert result.exit_code == 0
    assert "mixlora, rank 3, 3 experts, up_proj, whether it fits a base was not checked: give --base" in result.stdout
    assert loraplex("verify", small).exit_code == 0
    assert "lora_A.weight" in one_error(loraplex("verify", broken))
    tensors = load_file(mixture / WEIGHTS)
    del tensors["mixlora.layers.1.gate.weight"]
    save_file(tensors, mixture / WEIGHTS)
    assert "mixlora.layers.1" in one_error(loraplex("verify", mixture))


def test_dora_and_pickled_weights_cannot_be_verified_without_a_base(mixture: Path) -> None:
    tensors = load_file(mixture / WEIGHTS)
    tensors["mixlora.layers.0.experts.0.up_proj.lora_magnitude_vector"] = torch.ones(48)
    save_file(tensors, mixture / WEIGHTS)
    path = mixture / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    assert "base" in one_error(loraplex("verify", mixture))
    torch.save(tensors, mixture / "adapter_model.bin")
    (mixture / WEIGHTS).unlink()
    assert "give a base model with --base" in one_error(loraplex("verify", mixture, "--allow-bin"))


def test_verify_passes_good_adapters_one_by_one_or_by_the_folder(saved: Path, base: Path) -> None:
    one = loraplex("verify", saved / "adapters" / "small", "--base", base)
    assert one.exit_code == 0
    assert one.stdout.startswith("ok: ")
    assert "rank 4, q_proj, 2 pages" in one.stdout
    both = loraplex("verify", saved / "adapters", "--base", base)
    assert both.exit_code == 0
    assert both.stdout.count("ok: ") == 2
    assert both.stdout.splitlines()[-1].startswith("2 of 2 adapters can be served")


def test_verify_names_the_key_of_a_bad_adapter_and_goes_on(small: Path, broken: Path, base: Path) -> None:
    result = loraplex("verify", broken, small, "--base", base)
    error = one_error(result)
    assert f"error: {broken}: " in error
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in error
    assert "ok: " in result.stdout
    assert "1 of 2 adapters" in result.stdout


def test_verify_reads_pickled_weights_only_when_allowed(small: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((small / "adapter_config.json").read_bytes())
    torch.save(load_file(small / WEIGHTS), folder / "adapter_model.bin")
    assert "adapter_model.bin" in one_error(loraplex("verify", folder, "--base", base))
    assert loraplex("verify", folder, "--base", base, "--allow-bin").exit_code == 0


def test_verify_of_nothing_is_an_error(base: Path, tmp_path: Path) -> None:
    assert "neither an adapter" in one_error(loraplex("verify", tmp_path, "--base", base))
    assert "no such folder" in one_error(loraplex("verify", tmp_path / "nothing", "--base", base))


def test_verify_against_no_base_is_one_line(small: Path, tmp_path: Path) -> None:
    assert "no such folder" in one_error(loraplex("verify", small, "--base", tmp_path / "nothing"))
    assert "config.json" in one_error(loraplex("verify", small, "--base", tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert "GPT2LMHeadModel is not supported" in one_error(loraplex("verify", small, "--base", tmp_path))


def test_commands_that_speak_to_a_server_do_not_import_torch() -> None:
    modules = "loraplex.server.cli_adapters, loraplex.server.cli_served_adapters, loraplex.server.cli_chat"
    script = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
