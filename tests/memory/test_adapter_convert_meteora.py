from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.memory.adapter_convert import write_adapter
from loraplex.memory.adapter_convert_meteora import Gates, meteora_from
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import BaseShape

SITES = {"self_attn.q_proj": 32, "self_attn.v_proj": 32, "mlp.down_proj": 48}
PREFIX = "base_model.model.model.layers"
SavePeft = Callable[..., tuple[Path, Any]]


@pytest.fixture
def save_lora(save_peft: SavePeft, edit_tensors: Callable[..., None]) -> Callable[..., Path]:
    """Saves an adapter with weights of its own."""

    def save(name: str, seed: int, **options: Any) -> Path:
        folder, _ = save_peft(name=name, target_modules=[site.split(".")[1] for site in SITES], **options)
        torch.manual_seed(seed)
        edit_tensors(folder, lambda tensors: tensors.update({k: torch.randn(t.shape) for k, t in tensors.items()}))
        return folder

    return save


@pytest.fixture
def adapters(save_lora: Callable[..., Path]) -> list[Path]:
    """Three adapters; the second has scales of its own."""
    scales: list[dict[str, Any]] = [{}, {"alpha_pattern": {"v_proj": 1}}, {}]
    return [save_lora(f"lora{index}", index, **options) for index, options in enumerate(scales)]


@pytest.fixture
def published(adapters: list[Path]) -> dict[str, torch.Tensor]:
    """The checkpoint as its program saves it, with the adapters in the order 1, 2, 0."""
    generator = torch.Generator().manual_seed(0)
    stored = [load_file(adapters[index] / "adapter_model.safetensors") for index in (1, 2, 0)]
    checkpoint = {"base_model.model.model.embed_tokens.weight": torch.zeros(64, 32)}
    for layer in range(3):
        for site, width in SITES.items():
            key = f"{PREFIX}.{layer}.{site}"
            checkpoint[f"{key}.moe_gate.weight"] = torch.randn(3, width, generator=generator)
            checkpoint[f"{key}.lora_A.weight"] = torch.cat([one[f"{key}.lora_A.weight"] for one in stored])
            checkpoint[f"{key}.lora_B.weight"] = torch.cat([one[f"{key}.lora_B.weight"] for one in stored], dim=1)
    return checkpoint


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def without_loras(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in checkpoint.items() if ".lora_" not in key}


def test_the_checkpoint_and_its_adapters_become_one_folder(
    adapters: list[Path], published: dict[str, torch.Tensor], tmp_path: Path, base_shape: BaseShape
) -> None:
    gates = Gates.read([saved(published, tmp_path / "model.safetensors")])
    content = meteora_from(adapters, gates, base_shape)
    write_adapter(content, tmp_path / "out", check=lambda path: read_adapter(path, base_shape))
    spec = read_adapter(tmp_path / "out", base_shape)
    assert (spec.kind, spec.num_experts, len(spec.routers)) == ("meteora", 3, 9)
    assert spec.routing is not None
    assert (spec.routing.limit, spec.routing.renormalize) == (2, True)
    for router in spec.routers:
        block = "mlp" if router.site == "down_proj" else "self_attn"
        assert torch.equal(router.weight, published[f"{PREFIX}.{router.layer}.{block}.{router.site}.moe_gate.weight"])
    for expert, index in enumerate((1, 2, 0)):
        single = read_adapter(adapters[index], base_shape)
        ours = [pair for pair in spec.pairs if pair.expert == expert]
        for left, right in zip(single.pairs, ours, strict=True):
            assert (left.layer, left.site) == (right.layer, right.site)
            assert torch.equal(left.a, right.a)
            assert torch.equal(left.b, right.b)
            assert right.scale == pytest.approx(left.scale, rel=1e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16])
def test_the_order_shows_although_precisions_differ(
    adapters: list[Path],
    published: dict[str, torch.Tensor],
    edit_tensors: Callable[..., None],
    tmp_path: Path,
    base_shape: BaseShape,
    stored: torch.dtype,
    checkpoint: torch.dtype,
) -> None:
    for path in adapters:
        edit_tensors(path, lambda tensors: tensors.update({key: t.to(stored) for key, t in tensors.items()}))
    rounded = {key: tensor.to(stored).to(checkpoint) for key, tensor in published.items()}
    content = meteora_from(adapters, Gates.read([saved(rounded, tmp_path / "model.safetensors")]), base_shape)
    key = "meteora.layers.0.self_attn.q_proj.experts.0.lora_A.weight"
    own = load_file(adapters[1] / "adapter_model.safetensors")
    assert torch.equal(content.tensors[key], own[f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"])


def test_without_loras_in_the_checkpoint_the_order_given_counts(
    adapters: list[Path], published: dict[str, torch.Tensor], tmp_path: Path, base_shape: BaseShape
) -> None:
    gates = Gates.read([saved(without_loras(published), tmp_path / "model.safetensors")])
    content = meteora_from(adapters, gates, base_shape)
    key = "meteora.layers.0.self_attn.q_proj.experts.0.lora_A.weight"
    own = load_file(adapters[0] / "adapter_model.safetensors")
    assert torch.equal(content.tensors[key], own[f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"])


def test_the_temperature_divides_the_gates(
    adapters: list[Path], published: dict[str, torch.Tensor], tmp_path: Path, base_shape: BaseShape
) -> None:
    gates = Gates.read([saved(published, tmp_path / "model.safetensors")])
    content = meteora_from(adapters, gates, base_shape, temperature=15.0)
    key = "layers.2.mlp.down_proj.moe_gate.weight"
    assert torch.equal(content.tensors[f"meteora.{key}"], published[f"base_model.model.model.{key}"] / 15)
    with pytest.raises(AdapterFileError, match=r"temperature: expected a number above 0, got 0\.0"):
        meteora_from(adapters, gates, base_shape, temperature=0.0)


@pytest.mark.parametrize("nested", [True, False])
def test_pickled_checkpoints_are_read_only_when_allowed(
    published: dict[str, torch.Tensor], tmp_path: Path, nested: bool
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model": published} if nested else published, path)
    with pytest.raises(AdapterFileError, match=r"pytorch_model\.bin: pickled weights are read only when allowed"):
        Gates.read([path])
    assert len(Gates.read([path], allow_bin=True).gates) == 9
    with pytest.raises(AdapterFileError, match=f"{tmp_path}: no gate"):
        Gates.read([tmp_path])
    assert len(Gates.read([tmp_path], allow_bin=True).gates) == 9


def test_shards_are_read_as_one_checkpoint(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    items = list(published.items())
    saved(dict(items[:10]), tmp_path / "model-1.safetensors")
    saved(dict(items[10:]), tmp_path / "model-2.safetensors")
    assert len(Gates.read([tmp_path]).gates) == 9
    saved(dict(items[10:]), tmp_path / "model-3.safetensors")
    with pytest.raises(AdapterFileError, match=r"base_model\..*\.weight: there twice"):
        Gates.read([tmp_path])


def test_a_distributed_checkpoint_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"torch\.distributed\.checkpoint\.format_utils dcp_to_torch"):
        Gates.read([tmp_path])


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"bad")
    with pytest.raises(AdapterFileError, match=r"bad\.safetensors: cannot be read"):
        Gates.read([bad])
    torch.save([1], tmp_path / "list.bin")
    with pytest.raises(AdapterFileError, match=r"list\.bin: expected a dictionary"):
        Gates.read([tmp_path / "list.bin"], allow_bin=True)
    with pytest.raises(AdapterFileError, match=r"none\.safetensors: no gate; expected keys .*moe_gate\.weight"):
        Gates.read([saved({"a": torch.zeros(1)}, tmp_path / "none.safetensors")])


def test_a_linear_without_a_gate_is_refused_by_both(
    adapters: list[Path], published: dict[str, torch.Tensor], tmp_path: Path, base_shape: BaseShape
) -> None:
    del published[f"{PREFIX}.1.self_attn.v_proj.moe_gate.weight"]
    gates = Gates.read([saved(published, tmp_path / "model.safetensors")])
    with pytest.raises(
        AdapterFileError, match=r"layers\.1\.self_attn\.v_proj\.moe_gate\.weight: missing, but .*lora\d adapts"
    ):
        meteora_from(adapters, gates, base_shape)


def test_gates_for_another_number_of_adapters_are_refused(
    adapters: list[Path], published: dict[str, torch.Tensor], tmp_path: Path, base_shape: BaseShape
) -> None:
    gates = Gates.read([saved(without_loras(published), tmp_path / "model.safetensors")])
    with pytest.raises(AdapterFileError, match=r"moe_gate\.weight: shape \[3, 32\], expected \[2, 32\]"):
        meteora_from(adapters[:2], gates, base_shape)


def test_an_adapter_that_the_gates_were_not_trained_with_is_refused_by_its_folder(
    adapters: list[Path],
    published: dict[str, torch.Tensor],
    save_lora: Callable[..., Path],
    tmp_path: Path,
    base_shape: BaseShape,
) -> None:
    stranger = save_lora("stranger", 3)
    gates = Gates.read([saved(published, tmp_path / "model.safetensors")])
    with pytest.raises(AdapterFileError, match=r"stranger: its weights on model\.layers\.0\.self_attn\.q_proj are not"):
        meteora_from([*adapters[:2], stranger], gates, base_shape)
    with pytest.raises(AdapterFileError, match="not once"):
        meteora_from([*adapters[:2], adapters[0]], gates, base_shape)
