from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex.memory.adapter_errors import AdapterChangedError, AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_merge import draws_seed, merge_specs, read_source
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, LowRankPair, Routing
from loraplex.memory.merge_recipe import MergeRecipe, MergeSource

TARGETS = ["q_proj", "v_proj", "down_proj"]
SavePeft = Callable[..., tuple[Path, Any]]


@pytest.fixture
def adapters(save_peft: SavePeft, edit_tensors: Callable[..., None]) -> list[Path]:
    """Three adapters of equal rank with weights and scales of their own; the last lacks down_proj."""
    scales: list[dict[str, Any]] = [{"lora_alpha": 6}, {"lora_alpha": 3, "use_rslora": True}, {"lora_alpha": 8}]
    targets = (TARGETS, TARGETS, TARGETS[:2])
    folders = []
    for index, (modules, options) in enumerate(zip(targets, scales)):
        folders.append(save_peft(name=f"adapter-{index}", target_modules=list(modules), **options)[0])
        torch.manual_seed(index)
        edit_tensors(folders[-1], lambda tensors: tensors.update({k: torch.randn(t.shape) for k, t in tensors.items()}))
    return folders


def recipe_of(folders: list[Path], weights: list[float], **options: Any) -> MergeRecipe:
    sources = tuple(MergeSource(str(folder), 0, weight) for folder, weight in zip(folders, weights))
    return MergeRecipe(sources, **{"strategy": "ties", "density": 0.5, **options})


def by_peft(make_base: Callable[..., Any], recipe: MergeRecipe, seed: int = 0) -> dict[str, torch.Tensor]:
    """The merged tensors that PEFT itself makes, by the adapter's key without its prefix."""
    first, *others = [source.path for source in recipe.sources]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(make_base(), first, adapter_name="source-0")
        for index, path in enumerate(others, start=1):
            model.load_adapter(path, adapter_name=f"source-{index}")
        # The merged adapter is created with random weights before they are overwritten.
        model.base_model.inject_adapter = seeded_after(model.base_model.inject_adapter, seed)
        model.add_weighted_adapter(
            [f"source-{index}" for index in range(len(recipe.sources))],
            [source.weight for source in recipe.sources],
            "merged",
            combination_type=recipe.strategy,
            density=recipe.density,
            majority_sign_method=recipe.majority_sign,
        )
        state = peft.get_peft_model_state_dict(model, adapter_name="merged")
    return {key.removeprefix("base_model.model.model.layers."): value for key, value in state.items()}


def seeded_after(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        torch.manual_seed(seed)
        return result

    return call


def assert_same(spec: AdapterSpec, expected: dict[str, torch.Tensor]) -> None:
    assert len(expected) == 2 * len(spec.pairs)
    for pair in spec.pairs:
        assert pair.scale == 1.0
        block = "mlp" if pair.site == "down_proj" else "self_attn"
        for half, tensor in (("A", pair.a), ("B", pair.b)):
            theirs = expected[f"{pair.layer}.{block}.{pair.site}.lora_{half}.weight"]
            torch.testing.assert_close(tensor, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_merging_gives_what_peft_gives(
    adapters: list[Path],
    make_base: Callable[..., Any],
    base_shape: BaseShape,
    strategy: str,
    density: float,
    majority_sign: str,
) -> None:
    options = {"strategy": strategy, "density": density, "majority_sign": majority_sign}
    recipe = recipe_of(adapters, [0.7, -1.2, 0.4], **options)
    merged = read_source(recipe.to_path(), base_shape)
    assert merged.kind == "merged"
    assert_same(merged, by_peft(make_base, recipe, draws_seed(merged.identity)))


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_one_adapter_alone_is_only_weighted(
    adapters: list[Path], make_base: Callable[..., Any], base_shape: BaseShape, strategy: str
) -> None:
    recipe = recipe_of(adapters[:1], [-0.5], strategy=strategy)
    merged = read_source(recipe.to_path(), base_shape)
    assert_same(merged, by_peft(make_base, recipe))
    [single] = [
        pair for pair in read_adapter(adapters[0], base_shape).pairs if (pair.layer, pair.site) == (1, "q_proj")
    ]
    [ours] = [pair for pair in merged.pairs if (pair.layer, pair.site) == (1, "q_proj")]
    torch.testing.assert_close(ours.b @ ours.a, -0.5 * single.scale * single.b @ single.a)


def pair_of(value: float | torch.Tensor, *, rank: int = 64, size: int = 512) -> LowRankPair:
    full = torch.full((rank, size), value) if isinstance(value, float) else value
    return LowRankPair("q_proj", 0, full, full.T.contiguous(), 1.0)


def spec_of(*pairs: LowRankPair, identity: str = "a", **options: Any) -> AdapterSpec:
    return AdapterSpec(**{"identity": identity, "kind": "lora", "pairs": pairs, **options})


def test_dare_keeps_the_share_and_the_mean_of_the_values() -> None:
    specs = [spec_of(pair_of(1.0)), spec_of(pair_of(1.0))]
    recipe = recipe_of([Path("a"), Path("b")], [1.0, 0.0], strategy="dare_linear", density=0.25)
    [pair] = merge_specs(specs, recipe).pairs
    # Of 32,768 draws with p = 0.25, the share kept is within 0.01 with more than four standard deviations to spare.
    assert (pair.a != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert pair.a.unique().tolist() == [0.0, 4.0]
    assert not torch.equal(pair.a != 0, pair.b.T != 0)


def test_draws_depend_on_the_content_and_the_recipe_alone() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 512)
    specs = [spec_of(pair_of(values)), spec_of(pair_of(-values), identity="b")]
    recipe = recipe_of([Path("a"), Path("b")], [1.0, 0.5], strategy="dare_ties")
    first = merge_specs(specs, recipe)
    torch.manual_seed(1)
    elsewhere = recipe_of([Path("c"), Path("d")], [1.0, 0.5], strategy="dare_ties")
    again = merge_specs(specs, elsewhere)
    assert again.identity == first.identity
    assert torch.equal(again.pairs[0].a, first.pairs[0].a)
    other = merge_specs([specs[0], replace(specs[1], identity="c")], recipe)
    assert not torch.equal(other.pairs[0].a, first.pairs[0].a)


def test_every_setting_and_the_order_change_the_identity() -> None:
    specs = [spec_of(pair_of(1.0)), spec_of(pair_of(1.0), identity="b")]
    folders = [Path("a"), Path("b")]
    identities = [
        merge_specs(specs, recipe).identity
        for recipe in (
            recipe_of(folders, [1.0, 1.0]),
            recipe_of(folders, [1.0, 0.5]),
            recipe_of(folders, [1.0, 1.0], density=0.75),
            recipe_of(folders, [1.0, 1.0], majority_sign="frequency"),
            recipe_of(folders, [1.0, 1.0], strategy="dare_ties"),
        )
    ]
    identities.append(merge_specs(specs[::-1], recipe_of(folders, [1.0, 1.0])).identity)
    assert all(left != right for left, right in itertools.combinations(identities, 2))


def test_half_precision_is_merged_in_float32() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 512)
    half = [spec_of(pair_of(values.bfloat16())), spec_of(pair_of(values.bfloat16() / 3), identity="b")]
    wide = [replace(spec, pairs=tuple(replace(p, a=p.a.float(), b=p.b.float()) for p in spec.pairs)) for spec in half]
    recipe = recipe_of([Path("a"), Path("b")], [1.0, 0.5])
    [narrow_pair], [wide_pair] = merge_specs(half, recipe).pairs, merge_specs(wide, recipe).pairs
    assert narrow_pair.a.dtype == torch.float32
    assert torch.equal(narrow_pair.a, wide_pair.a)


def test_ranks_that_differ_on_a_site_are_refused_by_adapter_and_site() -> None:
    specs = [spec_of(pair_of(1.0)), spec_of(pair_of(1.0, rank=32))]
    with pytest.raises(
        AdapterFileError,
        match=r"adapter 2 of the merge: rank 32 on q_proj of layer 0, but adapter 1 has 64 there.*equal",
    ) as caught:
        merge_specs(specs, recipe_of([Path("/a"), Path("/b")], [1.0, 1.0]))
    assert caught.value.key == "merged_adapters"


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "dora", "pairs": (replace(pair_of(1.0), gain=torch.ones(512)),)},
        {"kind": "alora", "invocation": (1, 2)},
        {"kind": "mola", "routing": Routing("linear", 2, 1, True)},
        {"kind": "merged"},
    ],
)
def test_other_kinds_are_refused_by_adapter_and_kind(options: dict[str, Any]) -> None:
    specs = [spec_of(pair_of(1.0)), spec_of(pair_of(1.0), **{"pairs": (pair_of(1.0),), **options})]
    with pytest.raises(
        AdapterFileError, match=rf"adapter 2 of the merge: {options['kind']} cannot be merged; expected plain LoRA"
    ):
        merge_specs(specs, recipe_of([Path("/a"), Path("/b")], [1.0, 1.0]))


def test_a_source_that_is_no_recipe_is_read_as_a_folder(folder: Path, base_shape: BaseShape) -> None:
    assert read_source(folder, base_shape).identity == read_adapter(folder, base_shape).identity


def test_a_recipe_whose_source_is_missing_names_it(folder: Path, base_shape: BaseShape) -> None:
    recipe = recipe_of([folder, folder / "nothing"], [1.0, 1.0])
    with pytest.raises(AdapterFileError, match="nothing: no such folder"):
        read_source(recipe.to_path(), base_shape)


def test_a_result_beyond_the_served_dtype_is_refused_by_its_site(folder: Path, base_shape: BaseShape) -> None:
    path = recipe_of([folder, folder], [1e12, 1e12]).to_path()
    assert read_source(path, base_shape, dtype=torch.bfloat16).kind == "merged"
    with pytest.raises(AdapterFileError, match=r"merged lora_A of q_proj of layer 0: values up to .*float16"):
        read_source(path, base_shape, dtype=torch.float16)


def test_warnings_name_the_source(folder: Path, base_shape: BaseShape, edit_config: Callable[..., None]) -> None:
    edit_config(folder, strange_setting=1)
    merged = read_source(recipe_of([folder, folder], [1.0, 1.0]).to_path(), base_shape)
    assert len(merged.warnings) == 2
    assert str(folder) in merged.warnings[0]
    assert "strange_setting" in merged.warnings[0]


def test_a_merge_is_made_of_what_its_sources_were_registered_with(adapters: list[Path], base_shape: BaseShape) -> None:
    known = {str(folder): read_adapter(folder, base_shape).identity for folder in adapters[:2]}
    recipe = recipe_of(adapters[:2], [0.5, 0.5])
    asked: list[tuple[str, int]] = []

    def expected(path: str, revision: int) -> str | None:
        asked.append((path, revision))
        return known.get(path)

    read_source(recipe.to_path(), base_shape, expected=expected)
    assert asked == [(str(folder), 0) for folder in adapters[:2]]
    known[str(adapters[1])] = "other"
    with pytest.raises(AdapterChangedError, match="adapter 2 of the merge"):
        read_source(recipe.to_path(), base_shape, expected=expected)
