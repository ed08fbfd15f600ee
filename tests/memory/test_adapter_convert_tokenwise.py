from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex.memory.adapter_convert import write_adapter
from loraplex.memory.adapter_convert_tokenwise import tokenwise_from
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, BaseWeights, LowRankPair

SavePeft = Callable[..., tuple[Path, Any]]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 12, "use_rslora": True},
    {
        "r": 2,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"q_proj": 5},
    },
)


@pytest.fixture
def adapters(save_peft: SavePeft, edit_tensors: Callable[..., None]) -> list[Path]:
    """Three adapters of different weights, ranks, scales and targets."""
    folders = []
    for index, options in enumerate(OPTIONS):
        folders.append(save_peft(name=f"adapter-{index}", **options)[0])
        torch.manual_seed(index)
        edit_tensors(folders[-1], lambda tensors: tensors.update({k: torch.randn(t.shape) for k, t in tensors.items()}))
    return folders


@pytest.fixture
def router(tmp_path: Path) -> Path:
    path = tmp_path / "router.safetensors"
    save_file({"weight": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, path)
    return path


def by_place(spec: AdapterSpec, expert: int | None = None) -> dict[tuple[int | None, str], LowRankPair]:
    return {(pair.layer, pair.site): pair for pair in spec.pairs if pair.expert == expert}


def test_each_adapter_becomes_the_expert_of_its_number(
    adapters: list[Path], router: Path, tmp_path: Path, base_shape: BaseShape, base_weights: BaseWeights
) -> None:
    content = tokenwise_from(adapters, router, base_shape, top_k=1)
    write_adapter(
        content, tmp_path / "out", check=lambda path: read_adapter(path, base_shape, base_weights=base_weights)
    )
    mixture = read_adapter(tmp_path / "out", base_shape, base_weights=base_weights)
    assert (mixture.kind, mixture.num_experts) == ("tokenwise", 3)
    assert mixture.routing is not None
    assert mixture.routing.limit == 1
    for expert, path in enumerate(adapters):
        single, ours = by_place(read_adapter(path, base_shape)), by_place(mixture, expert)
        assert single.keys() <= ours.keys()
        for place, pair in single.items():
            assert torch.equal(ours[place].a, pair.a)
            assert torch.equal(ours[place].b, pair.b)
            assert ours[place].scale == pytest.approx(pair.scale, rel=1e-12)
        for place in ours.keys() - single.keys():
            assert not ours[place].b.any()


def test_every_expert_has_every_linear_that_any_has(
    adapters: list[Path], router: Path, tmp_path: Path, base_shape: BaseShape, base_weights: BaseWeights
) -> None:
    write_adapter(tokenwise_from(adapters, router, base_shape), tmp_path / "out", check=lambda _: None)
    mixture = read_adapter(tmp_path / "out", base_shape, base_weights=base_weights)
    places = {(layer, site) for layer in range(3) for site in ("q_proj", "v_proj", "down_proj")}
    assert all(by_place(mixture, expert).keys() == places for expert in range(3))


def test_the_router_chooses_as_its_tensor_says(
    adapters: list[Path], router: Path, tmp_path: Path, base_shape: BaseShape, base_weights: BaseWeights
) -> None:
    write_adapter(tokenwise_from(adapters, router, base_shape), tmp_path / "out", check=lambda _: None)
    routes = read_adapter(tmp_path / "out", base_shape, base_weights=base_weights).token_routes
    assert routes is not None
    logits = base_weights.first_inputs(0, 64) @ torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(routes.experts.long(), logits.sort(descending=True).indices[:, :2])


def test_the_router_is_found_by_its_name_among_others(
    adapters: list[Path], tmp_path: Path, base_shape: BaseShape
) -> None:
    named = torch.randn(3, 32)
    path = tmp_path / "named.safetensors"
    save_file({"other": torch.zeros(5, 5), "tokenwise.router.weight": named}, path)
    content = tokenwise_from(adapters, path, base_shape)
    assert torch.equal(content.tensors["tokenwise.router.weight"], named)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a": torch.zeros(3, 32), "b": torch.zeros(3, 32)},
            r"bad\.safetensors: 2 two-dimensional tensors, expected tok",
        ),
        ({"a": torch.zeros(3)}, r"bad\.safetensors: 0 two-dimensional tensors"),
        ({"a": torch.zeros(4, 32)}, r"a in bad\.safetensors: shape \[4, 32\], expected \[3, 32\]"),
        ({"a": torch.zeros(3, 31)}, r"a in bad\.safetensors: shape \[3, 31\], expected \[3, 32\]"),
    ],
)
def test_a_router_that_does_not_fit_is_refused_by_file_and_shape(
    adapters: list[Path], tmp_path: Path, base_shape: BaseShape, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=message):
        tokenwise_from(adapters, path, base_shape)


def test_a_router_file_that_cannot_be_read_is_named(
    adapters: list[Path], tmp_path: Path, base_shape: BaseShape
) -> None:
    with pytest.raises(AdapterFileError, match=r"nothing: cannot be read: No such file"):
        tokenwise_from(adapters, tmp_path / "nothing", base_shape)
    (tmp_path / "broken").write_bytes(b"not safetensors")
    with pytest.raises(AdapterFileError, match="broken: expected a safetensors file"):
        tokenwise_from(adapters, tmp_path / "broken", base_shape)


@pytest.mark.parametrize("top_k", [0, 4])
def test_top_k_beyond_the_adapters_is_refused(
    adapters: list[Path], router: Path, base_shape: BaseShape, top_k: int
) -> None:
    with pytest.raises(AdapterFileError, match=f"top_k: expected 1 to 3, the number of adapters, got {top_k}"):
        tokenwise_from(adapters, router, base_shape, top_k=top_k)


def test_an_adapter_of_the_embedding_cannot_be_an_expert(
    save_peft: SavePeft, router: Path, adapters: list[Path], base_shape: BaseShape
) -> None:
    options = {"target_modules": ["q_proj", "embed_tokens"], "save_options": {"save_embedding_layers": False}}
    folder, _ = save_peft(name="embedding", **options)
    with pytest.raises(AdapterFileError, match=r"embedding: adapts embed_tokens, which experts cannot"):
        tokenwise_from([*adapters[:2], folder], router, base_shape)


def test_a_mixture_cannot_be_an_expert(
    save_mixture: Callable[..., Path], router: Path, adapters: list[Path], base_shape: BaseShape
) -> None:
    with pytest.raises(AdapterFileError, match=r"mixture: mixlora cannot be an expert; expected plain LoRA"):
        tokenwise_from([*adapters[:2], save_mixture("mixlora")], router, base_shape)
