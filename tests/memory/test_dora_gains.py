"""DoRA's gains against PEFT itself, and against weights that are formed in full."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from loraplex.memory import dora_gains
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import LowRankPair
from loraplex.memory.dora_gains import Magnitude, gains_of

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_COPIES = {"save_embedding_layers": False}
KEY = "base_model.model.model.layers.1.self_attn.q_proj"


def refused(folder: Path, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert key in caught.value.message


def peft_gains(model: Any) -> dict[tuple[int | None, str], torch.Tensor]:
    """What PEFT's own layers scale their outputs by."""
    gains: dict[tuple[int | None, str], torch.Tensor] = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            dora = module.lora_magnitude_vector["default"]
            delta = module.get_delta_weight("default")
            transposed = delta.T if "embed_tokens" in path else delta
            norm = dora.get_weight_norm(module.get_base_layer().weight, transposed, scaling=1)
            *_, site = path.split(".")
            layer = int(path.split(".")[2]) if "layers" in path else None
            gains[layer, site] = (dora.weight / norm).detach()
    return gains


OPTIONS: dict[str, dict[str, Any]] = {
    "every_linear": {"target_modules": LINEARS},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "ranks_and_scales": {"target_modules": LINEARS, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 40}},
    "wider_than_the_matrix": {"r": 40},
    "head": {"target_modules": ["lm_head"], "save_options": NO_COPIES},
    "embeddings": {"target_modules": ["embed_tokens"], "save_options": NO_COPIES},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gains_are_those_of_peft(name, save_peft, base_shape, base_weights):
    folder, model = save_peft(use_dora=True, **OPTIONS[name])
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    theirs = peft_gains(model)
    assert spec.kind == "dora"
    assert spec.warnings == ()
    assert {(pair.layer, pair.site) for pair in spec.pairs} == theirs.keys()
    for pair in spec.pairs:
        assert pair.gain is not None
        assert pair.gain.dtype == torch.float32
        torch.testing.assert_close(pair.gain, theirs[pair.layer, pair.site], rtol=1e-5, atol=1e-6)


def adapted(pair: LowRankPair, weight: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that a pair makes of the base's."""
    assert pair.gain is not None
    whole = (weight.T if pair.site == "embed_tokens" else weight) + pair.scale * pair.b @ pair.a
    return pair.gain[:, None] * whole


@pytest.mark.parametrize("targets", [[*LINEARS, "lm_head"], ["embed_tokens"]])
def test_the_gains_make_the_model_that_peft_makes(targets, save_peft, base_shape, make_base, weights_of):
    folder, _ = save_peft(use_dora=True, target_modules=targets, save_options=NO_COPIES)
    base = make_base()
    weights = weights_of(base)
    spec = read_adapter(folder, base_shape, base_weights=weights)
    merged = {(pair.layer, pair.site): adapted(pair, weights.matrix(pair.site, pair.layer)) for pair in spec.pairs}
    for (layer, site), matrix in merged.items():
        own = weights.matrix(site, layer)
        own.copy_(matrix.T if site == "embed_tokens" else matrix)
    tokens = torch.arange(2, 20)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make_base(), str(folder)).eval()(tokens).logits
        torch.testing.assert_close(base(tokens).logits, theirs, rtol=1e-4, atol=1e-4)


def test_an_activated_dora_is_activated(save_peft, base_shape, base_weights, edit_config):
    folder, _ = save_peft(use_dora=True)
    edit_config(folder, alora_invocation_tokens=[5, 6])
    spec = read_adapter(folder, base_shape, base_weights=base_weights)
    assert (spec.kind, spec.invocation) == ("alora", (5, 6))
    assert all(pair.gain is not None for pair in spec.pairs)


def test_the_description_and_identity_need_no_base(save_peft, base_shape, base_weights):
    folder, _ = save_peft(use_dora=True)
    summary = describe_adapter(folder)
    assert (summary.kind, summary.rank, summary.targets) == ("dora", 4, ("q_proj",))
    assert identity_of(folder) == read_adapter(folder, base_shape, base_weights=base_weights).identity


# The norms


def random_pair(
    *, out: int = 70, rank: int = 6, scale: float = 1.5, seed: int = 0, site: str = "up_proj"
) -> LowRankPair:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 90, generator=generator), torch.randn(out, rank, generator=generator)
    return LowRankPair(site, 0, a, b, scale)


class OneMatrix:
    """A base with the same matrix everywhere, which counts how often it is read."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.reads = 0

    def matrix(self, site: str, layer: int | None = None) -> torch.Tensor:
        self.reads += 1
        return self.weight


def ones(pairs: list[LowRankPair]) -> list[Magnitude]:
    return [Magnitude(f"m{index}", torch.ones(pair.b.shape[0])) for index, pair in enumerate(pairs)]


def direct(weight: torch.Tensor, pair: LowRankPair) -> torch.Tensor:
    return 1 / (weight.double() + pair.scale * pair.b.double() @ pair.a.double()).norm(dim=1)


@pytest.mark.parametrize("block", [1, 90, 700, 1 << 20])
@pytest.mark.parametrize("largest_gram", [8, 1024])
def test_blocks_of_any_size_give_the_same_gains(block, largest_gram, monkeypatch):
    monkeypatch.setattr(dora_gains, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(dora_gains, "_LARGEST_GRAM", largest_gram)
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(9))
    pairs = [random_pair(seed=1), random_pair(seed=2, rank=3), random_pair(seed=3, rank=100, scale=-0.2)]
    base: Any = OneMatrix(weight)
    for gain, pair in zip(gains_of(pairs, ones(pairs), base, None), pairs, strict=True):
        torch.testing.assert_close(gain.double(), direct(weight, pair), rtol=2e-6, atol=0)
    assert base.reads == 1, "experts of one matrix share a read of it"


def test_an_embedding_is_worked_through_in_blocks_of_tokens(monkeypatch):
    monkeypatch.setattr(dora_gains, "_BLOCK_ELEMENTS", 700)
    weight = torch.randn(90, 70, generator=torch.Generator().manual_seed(9))
    pair = random_pair(site="embed_tokens")
    base: Any = OneMatrix(weight)
    (gain,) = gains_of([pair], ones([pair]), base, None)
    torch.testing.assert_close(gain.double(), direct(weight.T, pair), rtol=2e-6, atol=0)


def test_an_update_that_almost_cancels_the_weight_keeps_its_digits():
    pair = random_pair()
    nearly = -pair.scale * pair.b @ pair.a + 1e-3 * torch.randn(70, 90, generator=torch.Generator().manual_seed(4))
    base: Any = OneMatrix(nearly)
    (gain,) = gains_of([pair], ones([pair]), base, None)
    torch.testing.assert_close(gain.double(), direct(nearly, pair), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_those_of_the_weights_as_served(dtype):
    weight, pair = torch.randn(70, 90, generator=torch.Generator().manual_seed(5)), random_pair(scale=0.01)
    base: Any = OneMatrix(weight)
    (gain,) = gains_of([pair], ones([pair]), base, dtype)
    torch.testing.assert_close(gain.double(), direct(weight.to(dtype), pair), rtol=1e-6, atol=0)
    assert not torch.allclose(gain.double(), direct(weight, pair), rtol=1e-6, atol=0)


def test_gains_leave_the_number_of_threads_as_it_is():
    before = torch.get_num_threads()
    pair = random_pair()
    base: Any = OneMatrix(torch.zeros(70, 90))
    gains_of([pair], ones([pair]), base, None)
    assert torch.get_num_threads() == before


# Refusals


def test_dora_without_the_base_is_refused(save_peft, base_shape):
    folder, _ = save_peft(use_dora=True)
    refused(folder, base_shape, "base's weights at hand", "use_dora")


def test_a_missing_magnitude_is_refused_by_its_key(save_peft, base_shape, base_weights, edit_tensors):
    folder, _ = save_peft(use_dora=True)
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{KEY}.lora_magnitude")])
    refused(folder, base_shape, "DoRA needs it", f"{KEY}.lora_magnitude_vector", base_weights=base_weights)


def test_magnitudes_without_the_flag_are_refused(save_peft, base_shape, base_weights, edit_config):
    folder, _ = save_peft(use_dora=True)
    edit_config(folder, use_dora=False)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    refused(folder, base_shape, "use_dora in adapter_config.json is not true", key, base_weights=base_weights)


@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(31), r"shape \[31\], expected \[32\], \[out\] of q_proj"),
        (torch.ones(1, 32), r"\[1, 32\], expected \[32\]"),
        (torch.full((32,), torch.nan), "NaN"),
        (torch.ones(32).long(), "int64, expected float16"),
        (torch.full((32,), 3e38), "do not fit the served model's torch.float16"),
    ],
)
def test_a_broken_magnitude_is_refused_by_its_key(
    ending, value, match, save_peft, base_shape, base_weights, edit_tensors
):
    folder, _ = save_peft(use_dora=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{KEY}.lora_magnitude")]:
            tensors.pop(key)
        tensors[f"{KEY}.{ending}"] = value

    edit_tensors(folder, change)
    options = {"base_weights": base_weights, "dtype": torch.float16}
    refused(folder, base_shape, match, f"{KEY}.{ending}", **options)


def test_one_magnitude_under_two_names_is_refused(save_peft, base_shape, base_weights, edit_tensors):
    folder, _ = save_peft(use_dora=True)
    both = {f"{KEY}.lora_magnitude_vector": torch.ones(32), f"{KEY}.lora_magnitude_vector.weight": torch.ones(32)}
    edit_tensors(folder, lambda t: t.update(both))
    key = f"{KEY}.lora_magnitude_vector.weight"
    refused(folder, base_shape, "same matrix as", key, base_weights=base_weights)


def test_a_magnitude_alone_is_refused(save_peft, base_shape, base_weights, edit_tensors):
    folder, _ = save_peft(use_dora=True)
    edit_tensors(folder, lambda t: [t.pop(f"{KEY}.lora_{half}.weight") for half in "AB"])
    refused(folder, base_shape, "both of its halves", f"{KEY}.lora_A.weight", base_weights=base_weights)


def test_a_row_of_zeros_is_refused():
    weight, pair = torch.ones(70, 90), random_pair()
    weight[3] = 0
    pair.b[3] = 0
    base: Any = OneMatrix(weight)
    with pytest.raises(AdapterFileError, match=r"m0: row 3 .* length 0\.0") as caught:
        gains_of([pair], ones([pair]), base, None)
    assert caught.value.key == "m0"
