from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from loraplex.memory.adapter_convert import write_adapter
from loraplex.memory.adapter_convert_initialised import is_subtracted, plain_from_initialised
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_spec import BaseShape, BaseWeights

IDS = torch.tensor([[1, 5, 9, 33, 60, 2, 17]])


@pytest.fixture
def make_base(make_base: Callable[..., Any]) -> Callable[..., Any]:
    """Bases with weights large enough that what changes them shows."""

    def make() -> Any:
        model = make_base()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture
def trained(tmp_path: Path, make_base: Callable[..., Any]) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Saves an adapter of a given initialisation, as it was initialised and after changes that stand for training;
    returns its folder and the logits that PEFT's model gives on its own, changed base."""

    def train(init: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, torch.Tensor]:
        defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": init}
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(**{**defaults, **options})
            model = peft.get_peft_model(make_base().to(dtype), config).eval()
            first = copy.deepcopy(model)
            first.peft_config["default"].init_lora_weights = True
            first.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
            model.save_pretrained(tmp_path / "trained", save_embedding_layers=False)
        with torch.no_grad():
            return tmp_path / "trained", model(IDS).logits

    return train


@pytest.fixture
def converted_logits(make_base: Callable[..., Any], tmp_path: Path) -> Callable[..., torch.Tensor]:
    """The logits that PEFT gives for a folder on the unchanged base."""

    def logits(folder: Path) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(make_base(), folder).eval()
        with torch.no_grad():
            result: torch.Tensor = model(IDS).logits
        return result

    return logits


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 11}},
    {"use_rslora": True, "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 11}},
    {"target_modules": "all-linear"},
    {"target_modules": ["v_proj", "lm_head"]},
    {"use_dora": True},
]


@pytest.mark.parametrize("saved_start", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rslora", "patterns", "both", "all", "head", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_plain_adapter_gives_on_the_base_what_peft_gives_on_its_changed_base(
    trained: Callable[..., tuple[Path, torch.Tensor]],
    converted_logits: Callable[..., torch.Tensor],
    make_base: Callable[..., Any],
    base_shape: BaseShape,
    base_weights: BaseWeights,
    tmp_path: Path,
    init: str,
    options: dict[str, Any],
    saved_start: bool,
) -> None:
    folder, expected = trained(init, **options)
    content = plain_from_initialised(folder, base_weights, initial=tmp_path / "initial" if saved_start else None)
    assert content.warnings == ()
    out = tmp_path / "out"
    write_adapter(content, out, check=lambda path: read_adapter(path, base_shape, base_weights=base_weights))
    torch.testing.assert_close(converted_logits(out), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert (expected - make_base()(IDS).logits).abs().max() > 1e-2


def test_the_converted_adapter_reads_as_plain_lora_of_twice_the_rank(
    trained: Callable[..., tuple[Path, torch.Tensor]], base_shape: BaseShape, base_weights: BaseWeights, tmp_path: Path
) -> None:
    folder, _ = trained("pissa", rank_pattern={"up_proj": 7})
    with pytest.raises(AdapterFileError, match="init_lora_weights"):
        read_adapter(folder, base_shape)
    write_adapter(plain_from_initialised(folder, base_weights), tmp_path / "out", check=lambda _: None)
    spec = read_adapter(tmp_path / "out", base_shape)
    assert spec.kind == "lora"
    assert {(pair.site, pair.rank, pair.scale) for pair in spec.pairs} == {("q_proj", 8, 1.5), ("up_proj", 14, 6 / 7)}


def test_a_randomised_start_needs_the_saved_one(
    trained: Callable[..., tuple[Path, torch.Tensor]],
    converted_logits: Callable[..., torch.Tensor],
    base_weights: BaseWeights,
    tmp_path: Path,
) -> None:
    folder, expected = trained("pissa_niter_4")
    with pytest.raises(
        AdapterFileError, match=r"init_lora_weights .*pissa_niter_4 started cannot.*pissa or olora.*--initial"
    ):
        plain_from_initialised(folder, base_weights)
    content = plain_from_initialised(folder, None, initial=tmp_path / "initial")
    write_adapter(content, tmp_path / "out", check=lambda _: None)
    torch.testing.assert_close(converted_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_without_the_base_only_a_saved_start_will_do(
    trained: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = trained("pissa")
    with pytest.raises(AdapterFileError, match=r"init_lora_weights .*--base.*--initial"):
        plain_from_initialised(folder, None)
    assert plain_from_initialised(folder, None, initial=tmp_path / "initial").tensors


def test_another_base_than_the_one_it_began_with_is_warned_of(
    trained: Callable[..., tuple[Path, torch.Tensor]], make_base: Callable[..., Any], weights_of: Callable[[Any], Any]
) -> None:
    folder, _ = trained("pissa")
    other = make_base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.std() * torch.randn(parameter.shape))
    [warning] = plain_from_initialised(folder, weights_of(other)).warnings
    assert "is this the base that it began with?" in warning


def test_the_trained_half_stands_first_and_unchanged_also_on_a_base_in_half_precision(
    trained: Callable[..., tuple[Path, torch.Tensor]], make_base: Callable[..., Any], weights_of: Callable[[Any], Any]
) -> None:
    folder, _ = trained("olora", dtype=torch.bfloat16)
    content = plain_from_initialised(folder, weights_of(make_base().to(torch.bfloat16)))
    saved = load_file(folder / "adapter_model.safetensors")
    for key, tensor in content.tensors.items():
        assert torch.equal(tensor[:4] if "lora_A" in key else tensor[:, :4], saved[key].to(tensor.dtype))


def edited_start(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], edit_tensors: Callable[..., None]
) -> Path:
    edit_tensors(tmp_path / "initial", edit)
    return tmp_path / "initial"


A_KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B_KEY = A_KEY.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(A_KEY), "lora_A.weight: not in the adapter as it was before"),
        (
            lambda tensors: tensors.update({A_KEY: torch.zeros(5, 32)}),
            r"shape \[32, 4\] beside an A of shape \[5, 32\]",
        ),
        (lambda tensors: tensors.update({A_KEY: torch.zeros(4)}), r"beside an A of shape \[4\]"),
        (
            lambda tensors: tensors.update({A_KEY: torch.zeros(3, 32), B_KEY: torch.zeros(32, 3)}),
            r"lora_A\.weight: shape \[4, 32\], expected \[3, 32\]",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_by_its_key(
    trained: Callable[..., tuple[Path, torch.Tensor]],
    edit_tensors: Callable[..., None],
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:
    folder, _ = trained("pissa")
    initial = edited_start(tmp_path, edit, edit_tensors)
    with pytest.raises(AdapterFileError, match=message):
        plain_from_initialised(folder, None, initial=initial)


def test_a_start_with_another_scale_is_refused_by_the_setting(
    trained: Callable[..., tuple[Path, torch.Tensor]], edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder, _ = trained("pissa")
    edit_config(tmp_path / "initial", lora_alpha=7)
    with pytest.raises(AdapterFileError, match=r"lora_alpha in .*initial: expected 6\.0 .* got 7\.0"):
        plain_from_initialised(folder, None, initial=tmp_path / "initial")


def test_a_rank_that_the_base_does_not_allow_is_refused_by_its_key(
    trained: Callable[..., tuple[Path, torch.Tensor]],
    edit_tensors: Callable[..., None],
    edit_config: Callable[..., None],
    base_weights: BaseWeights,
) -> None:
    folder, _ = trained("olora")
    edit_config(folder, r=40)
    with pytest.raises(AdapterFileError, match=r"lora_A\.weight: shape \[4, 32\], expected \[32, 32\]"):
        plain_from_initialised(folder, base_weights)


def test_tensors_of_another_kind_are_refused_by_their_key(
    trained: Callable[..., tuple[Path, torch.Tensor]], edit_tensors: Callable[..., None], base_weights: BaseWeights
) -> None:
    folder, _ = trained("pissa")
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(1)}))
    with pytest.raises(AdapterFileError, match=r"base_model\.model\.score\.weight: expected lora_A"):
        plain_from_initialised(folder, base_weights)


def test_a_head_that_is_the_embedding_is_refused_by_its_key(
    trained: Callable[..., tuple[Path, torch.Tensor]], make_base: Callable[..., Any], weights_of: Callable[[Any], Any]
) -> None:
    folder, _ = trained("olora", target_modules=["v_proj", "lm_head"])
    tied = make_base()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(AdapterFileError, match=r"base_model\.model\.lm_head\.lora_A\.weight: .* is its embed_tokens"):
        plain_from_initialised(folder, weights_of(tied))


def test_loftq_cannot_be_put_back(
    trained: Callable[..., tuple[Path, torch.Tensor]], edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder, _ = trained("pissa")
    edit_config(folder, init_lora_weights="loftq")
    with pytest.raises(AdapterFileError, match=r"init_lora_weights .*loftq took nothing.*expected pissa, olora"):
        plain_from_initialised(folder, None, initial=tmp_path / "initial")


def test_an_adapter_of_another_type_is_refused(
    trained: Callable[..., tuple[Path, torch.Tensor]], edit_config: Callable[..., None], base_weights: BaseWeights
) -> None:
    folder, _ = trained("pissa")
    edit_config(folder, peft_type="MIXLORA")
    with pytest.raises(AdapterFileError, match=r"peft_type .*expected LORA, got MIXLORA"):
        plain_from_initialised(folder, base_weights)


@pytest.mark.parametrize(
    ("init", "expected"),
    [("pissa", True), ("pissa_niter_16", True), ("OLoRA", True), ("corda", True), ("lora_ga", True)]
    + [(init, False) for init in (True, False, None, "gaussian", "eva", "loftq")],
)
def test_initialisations_that_changed_the_base_are_told_from_others(init: object, expected: bool) -> None:
    assert is_subtracted({"init_lora_weights": init}) == expected
    assert is_subtracted(json.loads("{}")) is False
