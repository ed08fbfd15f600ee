"""The PEFT LoRA reader against PEFT itself, and its refusals."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, identity_of, read_adapter
from loraplex.memory.adapter_spec import AdapterSpec

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NO_COPIES = {"save_embedding_layers": False}

OPTIONS: dict[str, dict[str, Any]] = {
    "one_target": {},
    "every_linear_by_list": {"target_modules": LINEARS},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.[12]\.(self_attn\.v|mlp\.down)_proj"},
    "excluded": {"target_modules": LINEARS, "exclude_modules": ["v_proj"]},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"target_modules": LINEARS, "rank_pattern": {"v_proj": 2, r"^model.layers.1.mlp.up_proj": 7}},
    "alpha_pattern": {"target_modules": LINEARS, "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 40}},
    # PEFT sorts the keys when it saves, so the order that counts is that of the file.
    "first_pattern_counts": {"rank_pattern": {r".*": 3, "q_proj": 5}, "alpha_pattern": {"q_proj": 9, ".*": 2}},
    "regex_patterns": {
        "target_modules": LINEARS,
        "use_rslora": True,
        "rank_pattern": {r"layers\.(0|2)\.self_attn\.[qk]_proj": 2, r"mlp\.\w+": 9},
        "alpha_pattern": {r"\d\.mlp.*": 1, "proj": 100, "self_attn.v_proj": 11},
    },
    "some_layers": {"layers_to_transform": [0, 2]},
    "one_layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "save_options": NO_COPIES},
    "tied_head": {"target_modules": ["lm_head"], "tied": True, "save_options": NO_COPIES},
    "tied_pair": {
        "target_modules": ["embed_tokens", "lm_head"],
        "tied": True,
        "ensure_weight_tying": True,
        "save_options": NO_COPIES,
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig()},
    "monteclora": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    "dropout": {"lora_dropout": 0.5},
    "wide_rank": {"r": 40},
    "activated": {"alora_invocation_tokens": [5, 9], "task_type": "CAUSAL_LM"},
}


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """What each adapted module adds to its weight [out, in], by PEFT's own account."""
    deltas = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            deltas[path] = delta.T if "embed_tokens" in path else delta
    return deltas


def our_deltas(spec: AdapterSpec) -> dict[str, torch.Tensor]:
    deltas = {}
    for pair in spec.pairs:
        block = "self_attn" if pair.site[0] in "qkvo" else "mlp"
        path = f"model.layers.{pair.layer}.{block}.{pair.site}" if pair.layer is not None else pair.site
        deltas["model.embed_tokens" if path == "embed_tokens" else path] = pair.scale * pair.b @ pair.a
    return deltas


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for path, delta in theirs.items():
        torch.testing.assert_close(ours[path], delta, rtol=1e-5, atol=1e-5)


def load_peft(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_adds_what_peft_adds(name, save_peft, make_base, base_shape):
    folder, _ = save_peft(**OPTIONS[name])
    spec = read_adapter(folder, base_shape)
    loaded = load_peft(make_base(tied=OPTIONS[name].get("tied", False)), folder)
    assert_same(our_deltas(spec), peft_deltas(loaded))
    assert spec.warnings == ()


def test_an_activated_lora_says_from_which_tokens_on_it_acts(save_peft, base_shape, edit_config):
    folder, _ = save_peft(**OPTIONS["activated"])
    spec, summary = read_adapter(folder, base_shape), describe_adapter(folder)
    assert (spec.kind, spec.invocation) == (summary.kind, summary.invocation) == ("alora", (5, 9))
    identities = {spec.identity}
    for tokens in ([9, 5], [5], None):
        edit_config(folder, alora_invocation_tokens=tokens)
        identities.add(read_adapter(folder, base_shape).identity)
    assert len(identities) == 4


@pytest.mark.parametrize("name", OPTIONS)
def test_the_description_agrees_with_the_full_read(name, save_peft, base_shape):
    folder, _ = save_peft(**OPTIONS[name])
    spec, summary = read_adapter(folder, base_shape), describe_adapter(folder)
    assert (summary.kind, summary.rank, summary.targets) == (spec.kind, spec.rank, spec.targets)
    assert (summary.num_experts, summary.top_k, summary.routing, summary.scope) == (0, 0, "", None)
    assert identity_of(folder) == spec.identity


def test_fan_in_fan_out_changes_nothing_as_in_peft(save_peft, make_base, base_shape, edit_config):
    folder, _ = save_peft(target_modules=LINEARS)
    before = read_adapter(folder, base_shape)
    edit_config(folder, fan_in_fan_out=True)
    after = read_adapter(folder, base_shape)
    assert_same(our_deltas(after), peft_deltas(load_peft(make_base(), folder)))
    assert after.identity == before.identity


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_is_plain_lora_on_the_unchanged_base(
    init, use_rslora, tmp_path: Path, make_base, base_shape
):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": use_rslora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make_base(), peft.LoraConfig(init_lora_weights=init, **options))
        model.save_pretrained(tmp_path / "initial")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        trained = {
            path: module.get_base_layer().weight + module.get_delta_weight("default")
            for path, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer)
        }
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    spec = read_adapter(tmp_path / "converted", base_shape)
    assert spec.rank == 8
    original = make_base()
    for path, delta in our_deltas(spec).items():
        torch.testing.assert_close(original.get_submodule(path).weight + delta, trained[path], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_keep_the_dtype_in_which_they_were_stored(dtype, save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    spec = read_adapter(folder, base_shape)
    assert {half.dtype for pair in spec.pairs for half in (pair.a, pair.b)} == {dtype}


def test_pairs_come_in_the_order_of_layers_and_sites(save_peft, base_shape):
    folder, _ = save_peft(target_modules=[*LINEARS, "lm_head"], save_options=NO_COPIES)
    pairs = read_adapter(folder, base_shape).pairs
    assert [pair.site for pair in pairs] == LINEARS * 3 + ["lm_head"]
    assert [pair.layer for pair in pairs[::7]] == [0, 1, 2, None]


def test_a_target_without_tensors_is_a_warning(save_peft, base_shape, edit_config):
    folder, _ = save_peft()
    edit_config(folder, target_modules=["q_proj", "v_proj"])
    assert "v_proj" in read_adapter(folder, base_shape).warnings[0]


def test_copies_of_the_base_are_accepted_where_they_equal_it(save_peft, base_shape, weights_of):
    folder, model = save_peft(target_modules=["embed_tokens", "lm_head"])
    base = model.get_base_model()
    spec = read_adapter(folder, base_shape, base_weights=weights_of(base))
    assert_same(our_deltas(spec), peft_deltas(model))
    rounded = read_adapter(folder, base_shape, base_weights=weights_of(copy.deepcopy(base).bfloat16()))
    assert rounded.identity == spec.identity


def test_copies_of_another_base_are_refused(save_peft, base_shape, make_base, weights_of):
    folder, _ = save_peft(target_modules=["lm_head"])
    shifted, shorter = make_base(), make_base()
    shifted.lm_head.weight.data += 1
    shorter.lm_head.weight.data = shorter.lm_head.weight.data[1:]
    for base in (shifted, shorter):
        with pytest.raises(AdapterFileError, match=r"lm_head\.base_layer\.weight.*differs") as caught:
            read_adapter(folder, base_shape, base_weights=weights_of(base))
        assert caught.value.key == "base_model.model.lm_head.base_layer.weight"


def test_copies_of_the_base_are_refused_where_there_is_nothing_to_compare(save_peft, base_shape):
    folder, _ = save_peft(target_modules=["embed_tokens"])
    with pytest.raises(AdapterFileError, match=r"embed_tokens\.base_layer\.weight.*save_embedding_layers=False"):
        read_adapter(folder, base_shape)


UNSERVED = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "kasa_config": {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    "use_bdlora": {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"])},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("key", UNSERVED)
def test_what_peft_saves_but_is_not_served_is_refused_by_name(key, save_peft, base_shape):
    folder, _ = save_peft(**UNSERVED[key])
    with pytest.raises(AdapterFileError, match=key) as caught:
        read_adapter(folder, base_shape)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("self_attn.q_proj.lora_diag", UNSERVED["kasa_config"]),
        ("self_attn.q_proj.lora_B.bias", UNSERVED["lora_bias"]),
        ("embed_tokens.token_adapter.trainable_tokens_delta", UNSERVED["trainable_token_indices"]),
        ("lm_head.weight", UNSERVED["modules_to_save"]),
    ],
)
def test_tensors_of_unserved_variants_are_refused_whatever_the_configuration_says(
    key, options, save_peft, base_shape, edit_config
):
    folder, _ = save_peft(**options)
    edit_config(folder, **{name: None for name in options if name != "init_lora_weights"})
    with pytest.raises(AdapterFileError, match=re.escape(key)) as caught:
        read_adapter(folder, base_shape)
    assert caught.value.key is not None
    assert caught.value.key.endswith(key)


KEY = "base_model.model.model.layers.1.self_attn.q_proj"


def _rename(old: str, new: str) -> Any:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _replace(key: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({key: value})


A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
BROKEN = [
    pytest.param(lambda t: t.pop(B), B, "both of its halves", id="half a pair"),
    pytest.param(lambda t: t.pop(A), A, "both of its halves", id="the other half"),
    pytest.param(_replace(A, torch.ones(4, 48)), A, r"\[4, 48\].*\[4, 32\]", id="in features of another base"),
    pytest.param(_replace(B, torch.ones(64, 4)), B, r"\[64, 4\].*\[32, 4\]", id="out features of another base"),
    pytest.param(_replace(A, torch.ones(5, 32)), A, r"\[5, 32\].*\[4, 32\].*rank", id="rank of A"),
    pytest.param(_replace(B, torch.ones(32, 2)), B, r"\[32, 2\].*\[32, 4\]", id="rank of B"),
    pytest.param(_replace(A, torch.ones(0, 32)), A, r"\[0, 32\]", id="no rank"),
    pytest.param(_replace(A, torch.ones(4 * 32)), A, r"\[128\]", id="flat"),
    pytest.param(_replace(A, torch.full((4, 32), float("nan"))), A, "NaN", id="NaN"),
    pytest.param(_replace(B, torch.full((32, 4), float("-inf"))), B, "infinite", id="infinite"),
    pytest.param(_replace(A, torch.ones(4, 32).int()), A, "int32.*expected float16", id="integers"),
    pytest.param(_replace(A, torch.ones(4, 32).to(torch.float8_e4m3fn)), A, "float8.*expected float16", id="float8"),
    pytest.param(_rename(A, f"{KEY}.lora_C.weight"), "lora_C", "unknown tensor", id="unknown half"),
    pytest.param(_rename(A, A.replace("q_proj", "x_proj")), "x_proj", "unknown tensor", id="unknown module"),
    pytest.param(_rename(A, A.replace("q_proj", "qkv_proj")), "qkv_proj", "Phi-3.*not served", id="fused attention"),
    pytest.param(_rename(A, A.replace("q_proj", "gate_up_proj")), "gate_up_proj", "Phi-3.*not served", id="fused mlp"),
    pytest.param(_rename(A, A.replace("q_proj", "dense")), "dense", "linear of Phi, which", id="Phi"),
    pytest.param(_rename(A, A.replace("self_attn", "mlp")), "mlp.q_proj", "unknown tensor", id="wrong block"),
    pytest.param(_rename(A, A.replace("base_model.model.", "")), "model.layers.1", "unknown tensor", id="no prefix"),
    pytest.param(_rename(A, A.replace("layers.1", "layers.01")), "layers.01", "unknown tensor", id="padded layer"),
    pytest.param(_replace(A.replace("layers.1", "layers.3"), torch.ones(4, 32)), "layers.3", "missing", id="odd half"),
    pytest.param(_rename(A, f"{KEY}.lora_embedding_A"), "lora_embedding_A", "unknown tensor", id="embedding half"),
    pytest.param(_rename(A, f"{KEY}.weight"), "q_proj.weight", "base model", id="base weight"),
    pytest.param(_rename(A, f"{KEY}.bias"), "q_proj.bias", "biases", id="bias"),
    pytest.param(_rename(A, "mixlora.layers.0.mlp.moe_gate.weight"), "mixlora", "peft_type", id="mixture"),
    pytest.param(lambda t: t.clear(), "adapter_model.safetensors", "no LoRA tensors", id="empty"),
]


@pytest.mark.parametrize(("change", "key", "sentence"), BROKEN)
def test_broken_tensors_are_refused_by_key(change, key, sentence, save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()
    edit_tensors(folder, change)
    with pytest.raises(AdapterFileError, match=sentence) as caught:
        read_adapter(folder, base_shape)
    assert key in caught.value.message
    assert caught.value.key is not None
    assert key in caught.value.key


def test_a_layer_beyond_the_base_is_refused_with_the_layers_there_are(save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key.replace("layers.2", "layers.3"): tensors.pop(key) for key in list(tensors)})

    edit_tensors(folder, move)
    with pytest.raises(AdapterFileError, match=r"layers\.3.*0 to 2"):
        read_adapter(folder, base_shape)


def test_a_site_that_the_base_lacks_is_refused(save_peft, base_shape):
    folder, _ = save_peft(target_modules=["gate_proj"])
    del base_shape.sites["gate_proj"]
    with pytest.raises(AdapterFileError, match=r"gate_proj\.lora_A.*has no gate_proj"):
        read_adapter(folder, base_shape)


def test_a_rank_other_than_the_configured_one_is_refused(save_peft, base_shape, edit_config):
    folder, _ = save_peft()
    edit_config(folder, r=8)
    with pytest.raises(AdapterFileError, match=r"lora_A.weight: shape \[4, 32\], expected \[8, 32\]"):
        read_adapter(folder, base_shape)


@pytest.mark.parametrize(("largest", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (-1e5, False)])
def test_values_beyond_the_served_dtype_are_refused(largest, fits, save_peft, base_shape, edit_tensors):
    folder, _ = save_peft()
    edit_tensors(folder, lambda tensors: tensors[A].__setitem__((0, 0), largest))
    assert read_adapter(folder, base_shape)
    assert read_adapter(folder, base_shape, dtype=torch.bfloat16)
    if fits:
        assert read_adapter(folder, base_shape, dtype=torch.float16)
    else:
        with pytest.raises(AdapterFileError, match=r"layers\.1.*lora_A\.weight.*float16.*6\.55e\+04"):
            read_adapter(folder, base_shape, dtype=torch.float16)
