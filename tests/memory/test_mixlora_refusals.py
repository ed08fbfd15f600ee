"""MixLoRA: every refusal names the key at fault."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, read_adapter

TENSORS = "adapter_model.safetensors"


def refused(folder: Path, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert key in caught.value.message


CONFIG_REFUSALS = [
    ("r", None, "missing"),
    ("r", 0, "integer from 1"),
    ("lora_alpha", None, "missing"),
    ("num_experts", None, "missing"),
    ("num_experts", 0, "integer from 1 to 256"),
    ("num_experts", 10**12, "integer from 1 to 256"),
    ("num_experts", "4", "integer from 1 to 256"),
    ("num_experts", True, "integer"),
    ("top_k", 0, "integer from 1 to 4, got 0"),
    ("top_k", 5, "integer from 1 to 4, got 5"),
    ("top_k", 2.0, "integer from 1 to 4"),
    ("routing_strategy", None, "missing; expected mixlora, mixtral, mixlora-dynamic, mixlora-switch, switch"),
    ("routing_strategy", "mixlora-other", "mixlora-other is not served for this peft_type; expected mixlora"),
    ("routing_strategy", "mola", "mola is not served for this peft_type"),
    ("routing_strategy", 3, "a string"),
    ("act_fn", "mish", "mish is not served; expected silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu"),
    ("act_fn", 3, "a string"),
    ("expert_lora", [4], "an object or null"),
    ("alora_invocation_tokens", [1], "activated mixture is not served"),
    ("modules_to_save", ["lm_head"], "not served"),
    ("bias", "all", "biases"),
    ("layer_replication", [[0, 2]], "not served"),
    ("init_lora_weights", "pissa", "Convert the adapter"),
    ("use_dora", "yes", "true or false"),
    ("use_rslora", 1, "true or false"),
]


@pytest.mark.parametrize(("key", "value", "match"), CONFIG_REFUSALS)
def test_a_wrong_configuration_is_refused_by_key(key, value, match, save_mixture, base_shape):
    folder = save_mixture("mixlora")
    edited = {
        "num_experts": 4,
        "r": 4,
        "lora_alpha": 6,
        "top_k": 2,
        "routing_strategy": "mixlora",
        "peft_type": "MIXLORA",
    }

    (folder / "adapter_config.json").write_text(json.dumps({**edited, key: value}))
    refused(folder, base_shape, f"{key} in adapter_config.json: .*{re.escape(match)}", key)
    with pytest.raises(AdapterFileError, match=key):
        describe_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("top_p", 0, "above 0, at most 1"),
        ("top_p", 1.01, "above 0, at most 1"),
        ("top_p", float("nan"), "finite number"),
        ("top_p", "0.8", "finite number"),
        ("temperature", -0.1, "0 or a number above"),
        ("temperature", float("inf"), "finite number"),
    ],
)
def test_a_wrong_dynamic_routing_is_refused_by_key(key, value, match, save_mixture, base_shape):
    folder = save_mixture("mixlora", routing_strategy="mixlora-dynamic", **{key: value})
    refused(folder, base_shape, match, key)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"r": 0}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": "x"}, "alora_invocation_tokens"),
    ],
)
def test_a_wrong_value_in_expert_lora_is_refused_by_key(values, key, save_mixture, base_shape):
    named = f"expert_lora.{key}"
    refused(save_mixture("mixlora", expert_lora=values), base_shape, named, named)


def test_an_expert_rank_other_than_the_configured_one_is_refused(save_mixture, base_shape):
    folder = save_mixture("mixlora", expert_lora={"r": 5})
    key = "mixlora.layers.0.mlp.gate_proj.experts.0.lora_A.weight"
    refused(folder, base_shape, r"shape \[4, 32\], expected \[5, 32\]", key)


EXPERT = "mixlora.layers.1.mlp.up_proj.experts.2"
ROUTER = "mixlora.layers.1.mlp.moe_gate.weight"
ATTN = "mixlora.layers.1.self_attn.q_proj"


def _drop(*starts: str) -> Any:
    return lambda t: [t.pop(key) for key in list(t) if key.startswith(starts)]


def _put(key: str, *shape: int, like: float = 1.0) -> Any:
    return lambda t: t.update({key: torch.full(shape, like)})


def _rename(old: str, new: str) -> Any:
    return lambda t: t.update({new: t.pop(old)})


TENSOR_REFUSALS = [
    pytest.param(_drop(f"{EXPERT}.lora_B"), f"{EXPERT}.lora_B.weight", "both of its halves", id="half an expert"),
    pytest.param(_drop(f"{ATTN}.lora_A"), f"{ATTN}.lora_A.weight", "both of its halves", id="half a pair"),
    pytest.param(_drop(EXPERT), f"{EXPERT}.lora_A.weight", "needs all of 0 to 3", id="an expert is missing"),
    pytest.param(_drop(ROUTER), ROUTER, "needs this router", id="a router is missing"),
    pytest.param(
        _drop("mixlora.layers.1.mlp.up", "mixlora.layers.1.mlp.gate_", "mixlora.layers.1.mlp.down"),
        ROUTER,
        "a router without experts",
        id="a router alone",
    ),
    pytest.param(
        _put(ROUTER, 3, 32), ROUTER, r"\[3, 32\], expected \[4, 32\], \[num_experts, in\]", id="rows of a router"
    ),
    pytest.param(_put(ROUTER, 4, 48), ROUTER, r"\[4, 48\], expected \[4, 32\]", id="columns of a router"),
    pytest.param(_put(ROUTER, 128), ROUTER, r"\[128\]", id="a flat router"),
    pytest.param(_put(ROUTER, 4, 32, like=math.nan), ROUTER, "NaN", id="NaN in a router"),
    pytest.param(
        lambda t: t.update({ROUTER: torch.full((4, 32), 1e300, dtype=torch.float64)}),
        ROUTER,
        "do not fit",
        id="a router beyond float32",
    ),
    pytest.param(
        lambda t: t.update({ROUTER: t[ROUTER].int()}), ROUTER, "int32, expected float16", id="an integer router"
    ),
    pytest.param(
        _put(f"{EXPERT}.lora_A.weight", 4, 32, like=math.inf),
        f"{EXPERT}.lora_A.weight",
        "infinite",
        id="infinite expert",
    ),
    pytest.param(
        _put(f"{EXPERT}.lora_B.weight", 32, 4),
        f"{EXPERT}.lora_B.weight",
        r"\[32, 4\], expected \[48, 4\]",
        id="shape of B",
    ),
    pytest.param(
        _put("mixlora.layers.1.mlp.up_proj.experts.4.lora_A.weight", 4, 32),
        "mixlora.layers.1.mlp.up_proj.experts.4.lora_B.weight",
        "both of its halves",
        id="half an expert too many",
    ),
    pytest.param(
        lambda t: t.update(
            {
                f"mixlora.layers.1.mlp.up_proj.experts.4.{half}": t[f"{EXPERT}.{half}"].clone()
                for half in ("lora_A.weight", "lora_B.weight")
            }
        ),
        "mixlora.layers.1.mlp.up_proj.experts.4.lora_A.weight",
        "expert 4 does not exist; num_experts",
        id="an expert too many",
    ),
    pytest.param(
        _put("mixlora.layers.1.experts.2.up_proj.lora_A.weight", 4, 32),
        f"{EXPERT}.lora_A.weight",
        r"same matrix as mixlora\.layers\.1\.experts\.2\.up_proj",
        id="one expert under two names",
    ),
    pytest.param(
        _put("mixlora.layers.1.gate.weight", 4, 32),
        ROUTER,
        r"the same router as mixlora\.layers\.1\.gate\.weight",
        id="one router under two names",
    ),
    pytest.param(_rename(ROUTER, f"{ROUTER}.bias"), f"{ROUTER}.bias", "unknown tensor", id="an unknown tensor"),
    pytest.param(_put("extra", 2), "extra", "unknown tensor; expected mixlora", id="an extra tensor"),
    pytest.param(
        _rename(f"{ATTN}.lora_A.weight", "mixlora.layers.1.mlp.q_proj.lora_A.weight"),
        "mixlora.layers.1.mlp.q_proj.lora_A.weight",
        "unknown tensor",
        id="attention in the wrong block",
    ),
    pytest.param(
        _put("mixlora.layers.1.self_attn.q_proj.experts.0.lora_A.weight", 4, 32),
        "mixlora.layers.1.self_attn.q_proj.experts.0.lora_A.weight",
        "unknown tensor",
        id="experts on attention",
    ),
    pytest.param(
        _put("mixlora.layers.1.mlp.up_proj.experts.02.lora_A.weight", 4, 32),
        "mixlora.layers.1.mlp.up_proj.experts.02.lora_A.weight",
        "unknown tensor",
        id="a padded number",
    ),
    pytest.param(
        _put("mixlora.layers.0.mlp.fc1.experts.0.lora_A.weight", 4, 32),
        "mixlora.layers.0.mlp.fc1.experts.0.lora_A.weight",
        "fc1 is a linear of Phi, which is not served",
        id="Phi",
    ),
    pytest.param(
        _put("mixlora.layers.0.experts.0.gate_up_proj.lora_A.weight", 4, 32),
        "mixlora.layers.0.experts.0.gate_up_proj.lora_A.weight",
        r"gate_up_proj is a linear of Phi-3 \(fused projections\), which is not served",
        id="Phi-3",
    ),
    pytest.param(
        _put("mixlora.layers.0.self_attn.qkv_proj.lora_A.weight", 4, 32),
        "mixlora.layers.0.self_attn.qkv_proj.lora_A.weight",
        "Phi-3",
        id="Phi-3's attention",
    ),
    pytest.param(
        lambda t: t.update({key.replace("layers.2", "layers.3"): t.pop(key) for key in list(t)}),
        None,
        "layer 3 does not exist; the served base has layers 0 to 2",
        id="a layer too many",
    ),
    pytest.param(
        lambda t: [t.pop(key) for key in list(t) if "mlp" in key], TENSORS, "holds no experts", id="no experts at all"
    ),
    pytest.param(lambda t: t.clear(), TENSORS, "holds no experts", id="nothing at all"),
]


@pytest.mark.parametrize(("change", "key", "match"), TENSOR_REFUSALS)
def test_broken_tensors_are_refused_by_key(change, key, match, save_mixture, base_shape, edit_tensors):
    folder = save_mixture("mixlora")
    edit_tensors(folder, change)
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, base_shape)
    assert caught.value.key is not None
    assert caught.value.key in caught.value.message
    assert key in (None, caught.value.key)


def test_a_missing_expert_is_named_as_its_file_names_the_others(save_mixture, base_shape, edit_tensors):
    folder = save_mixture("mixlora", naming="oldest")
    edit_tensors(folder, _drop("mixlora.layers.2.experts.3.w3_proj"))
    refused(folder, base_shape, "missing", "mixlora.layers.2.experts.3.w3_proj.lora_A.weight")


def test_values_beyond_the_served_dtype_are_refused(save_mixture, base_shape, edit_tensors):
    folder = save_mixture("mixlora")
    edit_tensors(folder, lambda t: t[f"{EXPERT}.lora_A.weight"].__setitem__((0, 0), 1e5))
    assert read_adapter(folder, base_shape, dtype=torch.bfloat16)
    refused(folder, base_shape, "float16", f"{EXPERT}.lora_A.weight", dtype=torch.float16)


def test_structure_is_checked_from_the_header_alone(save_mixture, edit_tensors):
    folder = save_mixture("mixlora")
    edit_tensors(folder, _drop(EXPERT))
    with pytest.raises(AdapterFileError, match=f"{EXPERT}.lora_A.weight: missing"):
        describe_adapter(folder)
