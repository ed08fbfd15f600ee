"""Folders of the newer kinds that must not be served: each is refused by the name of what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

ROUTER = "mixlora.layers.2.mlp.moe_gate.weight"
TOKEN_ROUTER = "tokenwise.router.weight"
EXPERT = "mixlora.layers.1.mlp.up_proj.experts.3"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"

Spoil = Callable[[Any], None]
Edit = Callable[[dict[str, Any]], object]


def tensors(edit: Edit) -> Spoil:
    return lambda folder: folder.edit_tensors(edit)


def config(**changes: Any) -> Spoil:
    return lambda folder: folder.edit_config(**changes)


def without(part: str) -> Spoil:
    """Drop every tensor with this in its key."""

    def edit(found: dict[str, Any]) -> None:
        dropped = [key for key in found if part in key]
        assert dropped
        for key in dropped:
            del found[key]

    return tensors(edit)


def with_value(key: str, value: float) -> Spoil:
    return tensors(lambda found: found[key].reshape(-1).__setitem__(-1, value))


def reshaped(key: str, *shape: int) -> Spoil:
    return tensors(lambda found: found.update({key: np.zeros(shape, dtype=np.float32)}))


def renamed(old: str, new: str) -> Spoil:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def copied(old: str, new: str) -> Spoil:
    return tensors(lambda found: found.update({new: found[old]}))


FAULTS: list[tuple[str, str, Spoil, str]] = [
    ("words-mixlora", "an expert is missing at one linear", without(f"{EXPERT}."), "mixlora.layers.1.mlp.up_proj"),
    ("words-mixlora", "a half of an expert is missing", without(f"{EXPERT}.lora_B"), EXPERT),
    ("words-mixlora", "the last expert is missing everywhere", without(".experts.3."), "num_experts"),
    ("words-mixlora", "a layer has no router", without(ROUTER), ROUTER),
    ("words-mixlora", "a router has NaN", with_value(ROUTER, math.nan), ROUTER),
    ("words-mixlora", "an expert has an infinity", with_value(f"{EXPERT}.lora_A.weight", math.inf), EXPERT),
    ("words-mixlora", "a router is for another base", reshaped(ROUTER, 4, 96), ROUTER),
    ("words-mixlora", "a router is for more experts", reshaped(ROUTER, 5, 192), ROUTER),
    ("words-mixlora", "an expert has another rank", reshaped(f"{EXPERT}.lora_A.weight", 6, 192), EXPERT),
    ("words-mixlora", "a layer is beyond the base's", copied(ROUTER, ROUTER.replace("2", "9")), "layers.9"),
    ("words-mixlora", "a key is unknown", renamed(ROUTER, "mixlora.layers.2.mlp.mystery"), "mystery"),
    ("words-mixlora", "more experts than there are", config(top_k=5), "top_k"),
    ("words-mixlora", "no experts at all", config(top_k=0), "top_k"),
    ("words-mixlora", "an unknown strategy", config(routing_strategy="mixlora-dice"), "routing_strategy"),
    ("words-mixlora", "an unknown activation", config(act_fn="sine"), "act_fn"),
    ("words-mixlora", "an impossible top_p", config(routing_strategy="mixlora-dynamic", top_p=1.5), "top_p"),
    ("words-mixlora", "an unknown kind", config(peft_type="MIXTURE"), "peft_type"),
    ("words-mixlora", "another kind's name", config(peft_type="MOLA"), "routing_strategy"),
    ("words-mixlora", "experts that are no LoRA settings", config(expert_lora=[4, 8]), "expert_lora"),
    ("words-tokenwise", "no router", without(TOKEN_ROUTER), TOKEN_ROUTER),
    ("words-tokenwise", "a router with NaN", with_value(TOKEN_ROUTER, math.nan), TOKEN_ROUTER),
    ("words-tokenwise", "a missing expert", without("layers.0.mlp.down_proj.experts.0."), "layers.0.mlp.down_proj"),
    ("words-tokenwise", "a count that is wrong", config(num_experts=3), "num_experts"),
    ("reverse-dora", "DoRA without any magnitudes", without("lora_magnitude_vector"), "lora_magnitude_vector"),
    ("reverse-dora", "DoRA without those of one linear", without(MAGNITUDE), MAGNITUDE.rpartition(".")[0]),
    ("reverse-dora", "magnitudes that nothing asks for", config(use_dora=False), "lora_magnitude_vector"),
    ("reverse-dora", "magnitudes of another size", reshaped(MAGNITUDE, 191), MAGNITUDE),
    ("reverse-dora", "magnitudes with NaN", with_value(MAGNITUDE, math.nan), MAGNITUDE),
]


@pytest.fixture(autouse=True)
def nothing_else_is_lost(demo: Any) -> Any:
    assert demo.ask("loraplex", "upper") == "LORAPLEX"  # a model's kind is listed once it was read
    served = demo.get("/v1/models").json()
    yield
    assert demo.ask("loraplex", "upper") == "LORAPLEX"
    assert demo.get("/v1/models").json() == served


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [pytest.param(name, spoil, named, id=f"{name}: {fault}") for name, fault, spoil, named in FAULTS],
)
def test_a_spoilt_folder_is_refused_by_the_name_of_its_fault(
    demo: Any, load: Any, copy_adapter: Any, name: str, spoil: Spoil, named: str
) -> None:
    folder = copy_adapter(name)
    spoil(folder)
    answer = load("spoilt", folder.path)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "adapter_invalid")
    assert error["param"]
    assert named in f"{error['message']} {error['param']}"
    assert demo.get("/v1/adapters/spoilt").status_code == 404


def test_a_mixture_that_was_mended_is_served(demo: Any, load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("words-mixlora")
    with_value(ROUTER, math.nan)(folder)
    assert load("mended", folder.path).status_code == 400
    folder.become("words-mixlora")
    assert load("mended", folder.path).status_code == 200
    messages = [{"role": "system", "content": "upper"}, {"role": "user", "content": "hello"}]
    assert demo.ask("", "mended", messages=messages) == "HELLO"
    assert demo.post("/v1/unload_lora_adapter", {"lora_name": "mended"}).status_code == 200
