"""What is read from a transformers configuration, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from loraplex.server.traits import ARCHITECTURES, UnsupportedModelError, read_traits

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def traits_of(make: Callable[..., Any], architecture: str, **options: Any) -> Any:
    return read_traits(make(**SMALL, architectures=[architecture], **options))


@pytest.mark.parametrize(
    "config", [GPT2Config(architectures=["GPT2LMHeadModel"]), GemmaConfig(architectures=["GemmaForCausalLM"])]
)
def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones(config: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_traits(config)
    message = caught.value.message
    assert config.architectures[0] in message
    assert all(name in message for name in ARCHITECTURES)
    assert caught.value.param == "architectures"


@pytest.mark.parametrize("architectures", [None, []])
def test_a_configuration_without_an_architecture_is_refused(architectures: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="supported are"):
        read_traits(LlamaConfig(architectures=architectures))


def test_a_classifier_of_a_supported_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        traits_of(LlamaConfig, "LlamaForSequenceClassification")


def test_an_unsupported_activation_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'gelu'") as caught:
        traits_of(LlamaConfig, "LlamaForCausalLM", hidden_act="gelu")
    assert caught.value.param == "hidden_act"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "rope_theta": 1e4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_an_unsupported_rotary_scaling_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope_type '{rope['rope_type']}'.*default, linear, llama3, yarn"):
        traits_of(LlamaConfig, "LlamaForCausalLM", rope_parameters=rope)


def test_a_partial_rotary_embedding_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        traits_of(LlamaConfig, "LlamaForCausalLM", rope_parameters=rope)


def test_mistral_slides_in_every_layer() -> None:
    assert traits_of(MistralConfig, "MistralForCausalLM", sliding_window=9).windows == (9, 9, 9, 9)
    assert traits_of(MistralConfig, "MistralForCausalLM", sliding_window=None).windows == (None,) * 4


@pytest.mark.parametrize(("make", "name"), [(Qwen2Config, "Qwen2ForCausalLM"), (Qwen3Config, "Qwen3ForCausalLM")])
def test_qwen_slides_only_where_it_is_told_to(make: Any, name: str) -> None:
    sliding = traits_of(make, name, use_sliding_window=True, sliding_window=9, max_window_layers=3)
    assert sliding.windows == (None, None, None, 9)
    assert traits_of(make, name, use_sliding_window=False, sliding_window=9).windows == (None,) * 4


def test_biases_are_where_each_architecture_has_them() -> None:
    llama = traits_of(LlamaConfig, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)
    qwen2 = traits_of(Qwen2Config, "Qwen2ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = traits_of(Qwen3Config, "Qwen3ForCausalLM", head_dim=32)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (False, False, False, True)


def test_the_head_dimension_may_differ_from_hidden_over_heads() -> None:
    traits = traits_of(Qwen3Config, "Qwen3ForCausalLM", head_dim=32)
    assert (traits.head_dim, traits.q_size, traits.kv_size) == (32, 128, 64)
    assert traits.base_shape.sites["o_proj"] == (128, 64)
    assert traits_of(LlamaConfig, "LlamaForCausalLM").head_dim == 16


def test_rotary_frequencies_follow_theta() -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    traits = traits_of(LlamaConfig, "LlamaForCausalLM", rope_parameters=rope)
    expected = torch.tensor([500.0 ** (-2 * i / 16) for i in range(8)])
    torch.testing.assert_close(traits.inv_freq, expected)
    assert traits.rope_scale == 1.0


def test_the_rotary_theta_of_older_configurations_is_read() -> None:
    config = LlamaConfig.from_dict({**SMALL, "architectures": ["LlamaForCausalLM"], "rope_theta": 500.0})
    assert read_traits(config).inv_freq[1] == pytest.approx(500.0 ** (-2 / 16))
    scaled = {"type": "linear", "factor": 4.0}
    config = LlamaConfig.from_dict({**SMALL, "architectures": ["LlamaForCausalLM"], "rope_scaling": scaled})
    assert read_traits(config).inv_freq[0] == pytest.approx(0.25)
