"""``loraplex adapters`` with a mixture: what it tells, what it checks, and what it converts is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from loraplex.server.cli import app
from loraplex.server.demo.assets import adapters_folder, base_folder

OLDEST = {"gate_proj": "w1_proj", "up_proj": "w3_proj", "down_proj": "w2_proj"}


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)])


def in_oldest_names(key: str) -> str:
    """``mixlora.layers.L.mlp.P.experts.E.rest`` as it was published first."""
    key = key.replace(".mlp.moe_gate.", ".gate.")
    if ".experts." not in key:
        return key
    before, _, after = key.partition(".mlp.")
    site, _, expert, rest = after.split(".", 3)
    return f"{before}.experts.{expert}.{OLDEST[site]}.{rest}"


def test_inspect_tells_what_a_mixture_is_and_takes(demo: Any) -> None:
    told = command(
        "inspect", adapters_folder() / "words-mixlora", "--base", base_folder(), "--json", "--dtype", "float32"
    )
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert (facts["kind"], facts["num_experts"], facts["top_k"], facts["ranks"]) == ("mixlora", 4, 2, [4, 8])
    assert facts["experts_by_layer"] == {str(layer): 4 for layer in range(5)}
    demo.ask("a", "words-mixlora", max_tokens=1)
    served = demo.get("/v1/adapters/words-mixlora").json()
    assert (facts["pages"], facts["identity"]) == (served["pages"], served["identity"])


def test_a_pickled_mixture_in_the_oldest_names_is_converted_and_served(
    demo: Any, load: Any, run_command: Any, copy_adapter: Any, tmp_path: Path
) -> None:
    folder, out = copy_adapter("words-mixlora"), tmp_path / "out"
    old = {in_oldest_names(key): tensor for key, tensor in load_file(folder.weights).items()}
    torch.save(old, folder.path / "adapter_model.bin")
    folder.weights.unlink()
    folder.edit_config(target_modules={OLDEST.get(site, site): True for site in folder.config["target_modules"]})
    assert load("old", folder.path).status_code == 400
    refused = command("convert", folder.path, out)
    assert (refused.exit_code, out.exists()) == (1, False)
    assert "adapter_model.bin" in refused.stderr

    converted = run_command("adapters", "convert", folder.path, out, "--base", base_folder(), "--allow-bin")
    assert converted.returncode == 0, converted.stderr
    assert "mixlora, rank 8, 4 experts" in converted.stdout
    assert (
        load_file(out / "adapter_model.safetensors").keys()
        == load_file(adapters_folder() / "words-mixlora" / "adapter_model.safetensors").keys()
    )
    verified = command("verify", out, "--base", base_folder())
    assert (verified.exit_code, verified.stdout.startswith("ok: ")) == (0, True)
    assert load("old", out).status_code == 200
    messages = [{"role": "system", "content": "spell"}, {"role": "user", "content": "kernel"}]
    assert demo.ask("", "old", messages=messages) == "k-e-r-n-e-l"


def test_verify_names_the_fault_of_a_mixture(copy_adapter: Any) -> None:
    folder = copy_adapter("words-mixlora")
    folder.edit_tensors(lambda tensors: tensors.pop("mixlora.layers.2.mlp.moe_gate.weight"))
    verified = command("verify", folder.path, "--base", base_folder())
    assert verified.exit_code == 1
    assert "mixlora.layers.2.mlp.moe_gate.weight" in verified.stderr
