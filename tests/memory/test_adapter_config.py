"""``adapter_config.json``: what is refused by key, what is a warning, what is served."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import describe_adapter, read_adapter

CONFIG = "adapter_config.json"


def refused(folder: Path | str, shape: Any, match: str, key: str, **options: Any) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(folder, shape, **options)
    assert caught.value.key == key
    assert str(caught.value) == caught.value.message


WRONG_VALUES = [
    ("r", "8"),
    ("r", 0),
    ("r", -4),
    ("r", 4.0),
    ("r", True),
    ("r", 10**30),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_alpha", True),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400),
    ("use_rslora", 1),
    ("use_rslora", "true"),
    ("use_dora", 1),
    ("use_dora", "yes"),
    ("fan_in_fan_out", "no"),
    ("rank_pattern", []),
    ("rank_pattern", "q_proj"),
    ("alpha_pattern", 3),
    ("target_modules", 7),
    ("target_modules", ["q_proj", 3]),
    ("exclude_modules", {}),
    ("layers_to_transform", "1"),
    ("layers_to_transform", [0, "1"]),
    ("layers_pattern", 3),
    ("init_lora_weights", 3),
    ("init_lora_weights", "no_such_init"),
    ("peft_type", 3),
    ("base_model_name_or_path", 3),
    ("bias", "all"),
    ("bias", 7),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_a_wrong_value_in_the_configuration_is_refused_by_key(key, value, folder, base_shape, edit_config):
    edit_config(folder, **{key: value})
    refused(folder, base_shape, rf"{key} in adapter_config\.json.*", key)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("rank_pattern", {"q_proj": 0}, r"rank_pattern\[q_proj\].*1 to"),
        ("rank_pattern", {"q_proj": "4"}, r"rank_pattern\[q_proj\]"),
        ("alpha_pattern", {"q_proj": None}, r"alpha_pattern\[q_proj\].*finite number"),
    ],
)
def test_a_wrong_value_in_a_pattern_is_refused_by_key_and_pattern(key, value, match, folder, base_shape, edit_config):
    edit_config(folder, **{key: value})
    refused(folder, base_shape, match, f"{key}[q_proj]")


def test_a_pattern_that_is_no_regular_expression_is_refused(folder, base_shape, edit_config):
    edit_config(folder, rank_pattern={"q_proj[": 4})
    refused(folder, base_shape, r"q_proj\[ is no regular expression", "rank_pattern")


@pytest.mark.parametrize("pattern", ["(.+)+x", "(a|b)*", ".*" * 9, "(.|.)" * 24, "((.*).*){5}", "." + "?" * 30])
def test_a_pattern_that_would_hold_the_interpreter_is_refused(pattern, folder, base_shape, edit_config):
    edit_config(folder, alpha_pattern={pattern: 4})
    started = time.perf_counter()
    refused(folder, base_shape, "alpha_pattern.*too costly", "alpha_pattern")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "PiSSA"])
def test_an_unconverted_adapter_is_refused_with_the_conversion_to_run(init, folder, base_shape, edit_config):
    edit_config(folder, init_lora_weights=init)
    refused(folder, base_shape, f"{init}.*loraplex adapters convert PATH OUT --base MODEL", "init_lora_weights")


def test_a_loftq_adapter_is_refused_with_what_to_serve_instead(folder, base_shape, edit_config):
    edit_config(folder, init_lora_weights="loftq")
    refused(folder, base_shape, "LoftQ.*merge_and_unload", "init_lora_weights")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_plain_initialisations_are_served(init, folder, base_shape, edit_config):
    edit_config(folder, init_lora_weights=init)
    assert read_adapter(folder, base_shape).warnings == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_something_new", True),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("megatron_config", {"hidden_size": 32}),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.up_proj"]),
        ("modules_to_save", ["score"]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("lora_bias", True),
    ],
)
def test_variants_that_are_not_served_are_refused_by_name(key, value, folder, base_shape, edit_config):
    edit_config(folder, **{key: value})
    refused(folder, base_shape, rf"{key} in adapter_config\.json: .*not served", key)
    with pytest.raises(AdapterFileError, match=key):
        describe_adapter(folder)


@pytest.mark.parametrize("name", ["IA3", "ADALORA", "LOHA", "XLORA", "BOFT", "lora", ""])
def test_another_peft_type_is_refused_by_name(name, folder, base_shape, edit_config):
    edit_config(folder, peft_type=name)
    refused(
        folder, base_shape, rf"peft_type in adapter_config\.json: {name} is not served; expected LORA, ", "peft_type"
    )


FAMILIES = ["LORA", "MIXLORA", "MOLA", "LORAMOE", "TOKENWISE", "METEORA"]


def test_the_families_that_are_served_are_listed_where_another_is_asked_for(folder, base_shape, edit_config):
    edit_config(folder, peft_type="VERA")
    refused(folder, base_shape, f"expected {', '.join(FAMILIES)}", "peft_type")


@pytest.mark.parametrize(
    ("strategy", "family"),
    [
        ("mixlora", "mixlora"),
        ("mixlora-dynamic", "mixlora"),
        ("mixlora-switch", "mixlora"),
        ("mixtral", "mixlora"),
        ("switch", "mixlora"),
        ("mola", "mola"),
        ("loramoe", "loramoe"),
    ],
)
def test_the_routing_strategy_tells_the_family_where_there_is_no_type(strategy, family, save_mixture, base_shape):
    folder = save_mixture(family, peft_type=None, routing_strategy=strategy)
    assert read_adapter(folder, base_shape).kind == describe_adapter(folder).kind == family


@pytest.mark.parametrize("strategy", ["dice", "", "Mixlora", "meteora", "tokenwise", "dense"])
def test_another_strategy_without_a_type_is_refused_by_name(strategy, folder, base_shape, edit_config):
    edit_config(folder, peft_type=None, routing_strategy=strategy)
    refused(folder, base_shape, rf"routing_strategy in .*: {strategy} is not served", "routing_strategy")


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_mixture_whose_configuration_says_lora_is_refused(family, save_mixture, base_shape):
    folder = save_mixture(family.lower(), peft_type="LORA")
    with pytest.raises(AdapterFileError, match="a tensor of a mixture, but peft_type") as caught:
        read_adapter(folder, base_shape)
    assert caught.value.key is not None
    assert caught.value.key.startswith(family.lower())


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_lora_whose_configuration_says_mixture_is_refused(family, folder, base_shape, edit_config):
    edit_config(folder, peft_type=family, num_experts=2, routing_strategy="mixlora" if family == "MIXLORA" else None)
    with pytest.raises(AdapterFileError, match=rf"base_model\..*unknown tensor; expected {family.lower()}"):
        read_adapter(folder, base_shape)


@pytest.mark.parametrize("tokens", [[], "1, 2", [1, "2"], [True], [1.0], {"a": 1}, 7, [1] * 1025, [[1]]])
def test_an_invocation_that_is_no_list_of_tokens_is_refused(tokens, folder, base_shape, edit_config):
    edit_config(folder, alora_invocation_tokens=tokens)
    refused(folder, base_shape, "alora_invocation_tokens.*list of 1 to 1024 token ids", "alora_invocation_tokens")


def test_an_invocation_with_a_negative_token_is_refused(folder, base_shape, edit_config):
    edit_config(folder, alora_invocation_tokens=[3, -1])
    refused(folder, base_shape, "alora_invocation_tokens.*from 0 on, got -1", "alora_invocation_tokens")


def test_an_invocation_beyond_the_vocabulary_is_refused_with_its_size(folder, base_shape, edit_config):
    edit_config(folder, alora_invocation_tokens=[63])
    assert read_adapter(folder, base_shape).invocation == (63,)
    edit_config(folder, alora_invocation_tokens=[5, 64])
    refused(folder, base_shape, "alora_invocation_tokens.*64 is no token.*0 to 63", "alora_invocation_tokens")


def test_target_modules_may_say_yes_or_no_to_each_name(folder, base_shape, edit_config):
    edit_config(folder, target_modules={"q_proj": True, "v_proj": False, "o_proj": True})
    (warning,) = read_adapter(folder, base_shape).warnings
    assert "o_proj" in warning
    edit_config(folder, target_modules={"q_proj": 1})
    refused(folder, base_shape, "target_modules in", "target_modules")


def test_a_configuration_without_a_type_is_lora(folder, base_shape, edit_config):
    edit_config(folder, peft_type=None)
    assert read_adapter(folder, base_shape).kind == "lora"


def test_an_unknown_setting_is_a_warning(folder, base_shape, edit_config):
    edit_config(folder, flux_capacity=88, empty_setting=None)
    assert read_adapter(folder, base_shape).warnings == (
        "flux_capacity in adapter_config.json is not known to this server and has no effect",
    )


@pytest.mark.parametrize("served", ["org/other-base", "/models/other-base"])
def test_another_base_name_is_a_warning(served, folder, base_shape, edit_config):
    edit_config(folder, base_model_name_or_path="org/base")
    assert read_adapter(folder, base_shape, base_name=(served, "/models/third")).warnings != ()
    (warning,) = read_adapter(folder, base_shape, base_name=served).warnings
    assert "org/base" in warning
    assert served in warning


@pytest.mark.parametrize("served", ["org/base", "/models/base", None, ("my-name-for-it", "/models/base")])
def test_the_same_base_elsewhere_is_no_warning(served, folder, base_shape, edit_config):
    edit_config(folder, base_model_name_or_path="org/base")
    assert read_adapter(folder, base_shape, base_name=served).warnings == ()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_a_configuration_that_is_no_object_is_refused(content, match, folder, base_shape):
    (folder / CONFIG).write_bytes(content)
    refused(folder, base_shape, match, CONFIG)


def test_a_huge_configuration_is_refused_unread(folder, base_shape):
    with (folder / CONFIG).open("wb") as file:
        file.truncate(1 << 40)
    refused(folder, base_shape, "at most 4194304", CONFIG)
