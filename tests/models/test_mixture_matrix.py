"""Every kind of mixture under every option, on every base, through the engine, against a plain float64 reference.

Freed pages are filled with NaN, prompts are cut into chunks, and two prompts of an adapter share their steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.server.messages import AdapterRef

VOCAB, NEW_TOKENS = 300, 2
PROMPT_LENGTHS = (19, 5)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")

MIXLORA: dict[str, dict[str, Any]] = {
    "top-2": {},
    "top-1": {"top_k": 1},
    "all-experts": {"top_k": 4},
    "1-expert": {"num_experts": 1, "top_k": 1},
    "8-experts": {"num_experts": 8, "r": 5},
    "8-experts-top-3": {"num_experts": 8, "top_k": 3, "r": 1, "lora_alpha": 3},
    "rank-17": {"r": 17, "lora_alpha": 20, "num_experts": 2},
    "default-top-k": {"top_k": None},
    "without-peft-type": {"peft_type": None},
    "mixtral": {"peft_type": None, "routing_strategy": "mixtral"},
    "gate-alone": {"targets": ["gate_proj"]},
    "up-alone": {"targets": ["up_proj"]},
    "down-alone": {"targets": ["down_proj"]},
    "gate-and-down": {"targets": ["gate_proj", "down_proj"]},
    "gate-and-up": {"targets": ["gate_proj", "up_proj"], "attention": ATTENTION},
    "no-attention": {"attention": ()},
    "all-attention": {"attention": ATTENTION},
    "one-layer": {"layers": [1]},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "old-names": {"naming": "old"},
    "oldest-names": {"naming": "oldest", "attention": ATTENTION},
    "alias-names": {"naming": "alias"},
    "dora-on-gate-and-up": {"magnitudes": ["gate_proj", "up_proj"]},
    "dora-on-down": {"magnitudes": ["down_proj"]},
    "dora-on-all": {"magnitudes": [*ATTENTION, *FFN], "attention": ATTENTION},
    "dora-without-magnitudes": {"use_dora": True},
    "dora-on-down-alone-8-experts": {"targets": ["down_proj"], "magnitudes": ["down_proj"], "num_experts": 8},
    "expert-lora": {"expert_lora": {"r": 6, "lora_alpha": 3}},
    "expert-rslora": {"expert_lora": {"r": 3, "lora_alpha": 6, "use_rslora": True}},
    "expert-lora-without-outer-rslora": {"use_rslora": True, "expert_lora": {"r": 8, "use_rslora": False}},
    "expert-dora": {"use_dora": False, "magnitudes": FFN, "expert_lora": {"lora_alpha": 6, "use_dora": True}},
    "dynamic": {"routing_strategy": "mixlora-dynamic", "top_p": 0.8},
    "dynamic-default-top-p": {"routing_strategy": "mixlora-dynamic", "num_experts": 8, "top_k": None, "seed": 1},
    "dynamic-cold": {"routing_strategy": "mixlora-dynamic", "top_p": 0.9, "temperature": 0.7},
    "dynamic-hot": {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 1.5},
    "dynamic-dora-rslora-gelu": {
        "routing_strategy": "mixlora-dynamic",
        "num_experts": 8,
        "targets": ["gate_proj", "down_proj"],
        "magnitudes": ["down_proj", "gate_proj", "q_proj"],
        "use_rslora": True,
        "act_fn": "gelu",
    },
    "switch": {"routing_strategy": "mixlora-switch"},
    "switch-dora": {"routing_strategy": "switch", "magnitudes": FFN, "num_experts": 8},
    "gelu": {"act_fn": "gelu"},
    "gelu-new": {"act_fn": "gelu_new", "targets": ["up_proj"]},
}
LINEARS: dict[str, tuple[str, dict[str, Any]]] = {
    "mola-all-linears": ("MOLA", {}),
    "mola-top-1": ("MOLA", {"top_k": 1, "r": 3}),
    "mola-all-experts": ("MOLA", {"top_k": 8, "num_experts": 8, "routed": ["o_proj", "down_proj"]}),
    "mola-1-expert": ("MOLA", {"top_k": 1, "num_experts": 1, "routed": ["v_proj", "up_proj"]}),
    "mola-attention-alone": ("MOLA", {"routed": ATTENTION, "use_rslora": True}),
    "mola-mlp-beside-lora": ("MOLA", {"routed": FFN, "plain": ATTENTION}),
    "mola-k-and-gate-of-one-layer": ("MOLA", {"routed": ["k_proj", "gate_proj"], "layers": [2], "r": 9}),
    "mola-by-strategy": ("MOLA", {"peft_type": None, "routing_strategy": "mola"}),
    "loramoe": ("LORAMOE", {"routed": FFN, "plain": ATTENTION}),
    "loramoe-8-experts": ("LORAMOE", {"routed": FFN, "num_experts": 8, "use_rslora": True, "lora_alpha": 2}),
    "loramoe-1-expert": ("LORAMOE", {"routed": FFN, "plain": ["q_proj"], "num_experts": 1}),
    "loramoe-by-strategy": ("LORAMOE", {"routed": ["down_proj"], "peft_type": None, "routing_strategy": "loramoe"}),
    "meteora": ("METEORA", {}),
    "meteora-3-loras-top-1": ("METEORA", {"num_experts": 3, "top_k": 1, "routed": [*ATTENTION, "down_proj"]}),
    "meteora-8-loras": ("METEORA", {"num_experts": 8, "r": 6, "routed": ["q_proj", *FFN]}),
    "tokenwise": ("TOKENWISE", {}),
    "tokenwise-top-1": ("TOKENWISE", {"top_k": 1, "r": 7}),
    "tokenwise-8-experts": ("TOKENWISE", {"num_experts": 8, "top_k": 3, "routed": ["q_proj", "v_proj", "down_proj"]}),
    "tokenwise-all-experts": ("TOKENWISE", {"top_k": 4, "routed": FFN}),
    "tokenwise-1-expert": ("TOKENWISE", {"num_experts": 1, "top_k": 1, "routed": ["o_proj"]}),
    "tokenwise-last-layer": ("TOKENWISE", {"layers": [2], "use_rslora": True}),
}
OPTIONS = {f"mixlora-{name}": ("MIXLORA", options) for name, options in MIXLORA.items()} | LINEARS
BASES = ("llama", "mistral", "qwen2")
READ_ALIKE = (
    "without-peft-type",
    "mixtral",
    "default-top-k",
    "by-strategy",
    "old-names",
    "oldest-names",
    "alias-names",
)
"""Other ways to write what further options mean; the reader alone tells them apart, so one base will do."""

TIED = ("mixlora-top-2", "mixlora-dora-on-all", "mola-all-linears", "loramoe", "meteora", "tokenwise")
BIASED = ("mixlora-top-2", "mixlora-switch", "mixlora-dynamic-hot", "mixlora-down-alone", "mixlora-dora-on-all")
"""In these a bias of the feed-forward network could be counted wrongly."""

CASES = [
    *((option, base) for base in BASES for option in OPTIONS if base == "llama" or not option.endswith(READ_ALIKE)),
    *((option, "llama3") for option in TIED),
    *((option, "llama-biased") for option in BIASED),
]


@pytest.fixture(scope="module")
def plain_base(checkpoints: Callable[[str], Any], plain: Any) -> Callable[..., Any]:
    """The base's own answer to a prompt."""

    @cache
    def get(base: str, prompt: tuple[int, ...]) -> Any:
        return plain.plain_answer(checkpoints(base).model, [], prompt)

    return get


@pytest.mark.parametrize(("option", "base"), CASES)
def test_a_mixture_equals_the_plain_reference(
    option: str,
    base: str,
    checkpoints: Callable[[str], Any],
    folders: Any,
    plain: Any,
    answers: Any,
    plain_base: Callable[..., Any],
    make_engine: Any,
    tmp_path: Path,
) -> None:
    checkpoint, (kind, options) = checkpoints(base), OPTIONS[option]
    options = {"seed": crc32(option.encode())} | options
    folder = folders.write(checkpoint.model, tmp_path / option, kind, **options)
    driver = make_engine(checkpoint, pages=160, prefill_chunk=16, max_batch_tokens=32)
    prompts = {f"of-{length}": answers.random_prompt(5, length) for length in PROMPT_LENGTHS}
    for name, prompt in prompts.items():
        ref = AdapterRef(name=option, path=str(folder))
        driver.generate(name, prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()

    assert not driver.failed
    reference = plain.PlainModel(checkpoint.model, [(plain.read_folder(folder), 1.0)])
    for name, prompt in prompts.items():
        said = answers.assert_plain(driver.choices[name, 0], reference, prompt)
        of_base = plain_base(base, tuple(prompt)).logprobs
        assert (said.logprobs[: len(prompt)] - of_base).abs().max() > 0.1, "an adapter that does nothing proves nothing"
        assert said.tokens_differ_in_their_routes or "1-expert" in option
    driver.check_idle()


@pytest.mark.parametrize("option", ["mixlora-top-2", "mixlora-switch", "mixlora-dynamic", "mola-top-1", "tokenwise"])
def test_ties_go_to_the_lowest_index(
    option: str,
    checkpoints: Callable[[str], Any],
    folders: Any,
    plain: Any,
    answers: Any,
    make_engine: Any,
    tmp_path: Path,
) -> None:
    checkpoint, (kind, options) = checkpoints("llama"), OPTIONS[option]
    folder = folders.write(checkpoint.model, tmp_path / option, kind, **options)
    file = folder / "adapter_model.safetensors"
    tensors = {key: tensor if "lora_" in key else tensor * 0 for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    driver, prompt = make_engine(checkpoint, pages=160), answers.random_prompt(9, 12)
    ref = AdapterRef(name=option, path=str(folder))
    driver.generate("r", prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    tokens, found = answers.engine_answer(driver.choices["r", 0])
    expected = plain.plain_answer(checkpoint.model, [(folder, 1.0)], [*prompt, *tokens[:-1]])
    first = [list(range(len(route))) for routes in expected.routes.values() for route in routes]
    assert [[expert for expert, _ in route] for routes in expected.routes.values() for route in routes] == first
    torch.testing.assert_close(found.double(), expected.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MIXLORA", {"num_experts": 2}),
        ("MIXLORA", {"magnitudes": FFN, "num_experts": 3, "top_k": 2, "targets": ["gate_proj", "down_proj"]}),
        ("MIXLORA", {"routing_strategy": "mixlora-dynamic", "top_p": 0.95, "targets": ["up_proj"]}),
        ("MIXLORA", {"routing_strategy": "mixlora-switch", "act_fn": "gelu", "num_experts": 2}),
        ("MOLA", {"num_experts": 3}),
        ("LORAMOE", {"routed": FFN, "plain": ["q_proj"]}),
        ("TOKENWISE", {"num_experts": 3}),
    ],
    ids=["mixlora", "mixdora", "mixlora-dynamic", "mixlora-switch-gelu", "mola", "loramoe", "tokenwise"],
)
def test_a_long_prompt_beside_short_ones_equals_the_plain_reference(
    kind: str,
    options: dict[str, Any],
    checkpoints: Callable[[str], Any],
    folders: Any,
    plain: Any,
    answers: Any,
    make_engine: Any,
    tmp_path: Path,
) -> None:
    """More rows of one expert than are worked on at a time, and few of another request's."""
    checkpoint = checkpoints("llama")
    folder = folders.write(checkpoint.model, tmp_path / kind, kind, seed=31, **options)
    driver = make_engine(checkpoint, pages=160)
    prompts = {"short": answers.random_prompt(8, 3), "long": answers.random_prompt(7, 230)}
    for name, prompt in prompts.items():
        ref = AdapterRef(name=kind, path=str(folder))
        driver.generate(name, prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    reference = plain.PlainModel(checkpoint.model, [(plain.read_folder(folder), 1.0)])
    for name, prompt in prompts.items():
        answers.assert_plain(driver.choices[name, 0], reference, prompt)
