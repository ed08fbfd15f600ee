"""Every architecture under a matrix of PEFT options, in one mixed batch, against transformers and PEFT themselves.

The engine has a pool that holds only some of the adapters and few tokens: they are paged in and out, and sequences are
preempted and computed again. Freed pages are filled with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.messages import AdapterRef

VOCAB, NEW_TOKENS = 300, 12
PROMPT_LENGTHS = (42, 13)

OPTIONS: dict[str, dict[str, Any]] = {
    "two-sites": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all-linear-rslora": {"r": 3, "lora_alpha": 9, "target_modules": "all-linear", "use_rslora": True},
    "head-and-embedding": {"r": 16, "target_modules": ["lm_head", "embed_tokens", "down_proj", "k_proj"]},
    "one-layer-rank-pattern": {
        "r": 8,
        "target_modules": ["gate_proj", "o_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"o_proj": 2},
    },
    "regex-alpha-pattern": {
        "r": 5,
        "target_modules": r".*\.[02]\.(self_attn\.(q|o)_proj|mlp\.up_proj)",
        "alpha_pattern": {"q_proj": 20, r"layers\.2\.mlp\.up_proj": 1},
    },
    "both-patterns-rslora": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "up_proj": 1},
        "alpha_pattern": {"v_proj": 6},
    },
    "last-layer": {
        "r": 12,
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "layers_to_transform": 2,
        "layers_pattern": "layers",
    },
    "head-alone": {"r": 1, "lora_alpha": 4, "target_modules": ["lm_head"]},
    "embedding-fan-in-fan-out": {"r": 6, "target_modules": ["embed_tokens"], "fan_in_fan_out": True},
    "excluded": {"r": 10, "target_modules": "all-linear", "exclude_modules": ["down_proj", "gate_proj"]},
}

Answer = tuple[list[int], torch.Tensor]
"""Tokens, and log-probabilities [positions, vocabulary] of each prompt token but the first and of each new token."""


def prompts(seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]


def moves_the_logits(model: Any, prompt: list[int]) -> bool:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            return bool((model(input_ids=ids).logits - adapted).abs().max() > 0.1)


def answers_of_all(
    checkpoint: Any, root: Path, save_peft: Callable[..., Path], answers: Any
) -> dict[tuple[str, int], Answer]:
    """By option and prompt, "base" included; the adapters are saved under ``root``."""
    expected = {
        ("base", i): answers.peft_answer(checkpoint.model, prompt, NEW_TOKENS) for i, prompt in enumerate(prompts(0))
    }
    for seed, (name, options) in enumerate(OPTIONS.items(), start=1):

        def use(model: Any, name: str = name, seed: int = seed) -> None:
            for i, prompt in enumerate(prompts(seed)):
                expected[name, i] = answers.peft_answer(model, prompt, NEW_TOKENS)
                assert moves_the_logits(model, prompt), f"the test adapter {name} does nothing"

        save_peft(checkpoint, root / name, seed=seed, use=use, **options)
    return expected


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2-sliding", "qwen3"])
def test_a_mixed_batch_equals_transformers_and_peft(
    family: str,
    checkpoints: Callable[[str], Any],
    save_peft: Callable[..., Path],
    make_engine: Any,
    answers: Any,
    tmp_path: Path,
) -> None:
    checkpoint = checkpoints(family)
    expected = answers_of_all(checkpoint, tmp_path, save_peft, answers)
    driver = make_engine(checkpoint, pages=28, prefill_chunk=16, max_batch_tokens=96)
    for name, i in expected:
        seed = 0 if name == "base" else 1 + list(OPTIONS).index(name)
        ref = None if name == "base" else AdapterRef(name=name, path=str(tmp_path / name))
        request_id = f"{name}/{i}"
        driver.generate(request_id, prompts(seed)[i], ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()

    assert not driver.failed
    for name, i in expected:
        tokens, logprobs = answers.engine_answer(driver.choices[f"{name}/{i}", 0])
        assert tokens == expected[name, i][0], f"{family} under {name}"
        torch.testing.assert_close(logprobs, expected[name, i][1], rtol=0, atol=1e-4)
    stats = driver.engine.stats()
    assert stats.adapter_evictions > 0
    assert stats.preemptions > 0
    driver.check_idle()
