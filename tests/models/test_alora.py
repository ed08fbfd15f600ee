"""Activated LoRA against PEFT: rows before the last invocation are the base's, those after it the adapter's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.messages import AdapterRef

VOCAB, NEW_TOKENS = 300, 4
INVOCATION = [11, 12, 13]
ALORA = {"r": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def filler(answers: Any, seed: int, length: int) -> list[int]:
    """Tokens that are no part of an invocation."""
    return [token if token > 20 else token + 50 for token in answers.random_prompt(seed, length)]


def prompts_of(answers: Any) -> dict[str, list[int]]:
    a, b = filler(answers, 0, 21), filler(answers, 1, 14)
    return {
        "in-the-middle": [*a, *INVOCATION, *b],
        "on-a-page-boundary": [*a[:16], *INVOCATION, *b],
        "at-the-start": [*INVOCATION, *b],
        "at-the-end": [*a, *INVOCATION],
        "alone": INVOCATION,
        "twice": [*a[:5], *INVOCATION, *b, *INVOCATION, *a[5:9]],
        "begun-again-at-the-end": [*a, *INVOCATION, *b, *INVOCATION[:2]],
        "only-begun": [*a, *INVOCATION[:2]],
        "absent": a,
    }


@pytest.mark.parametrize("base", ["llama", "llama3", "mistral", "qwen2"])
def test_an_invocation_anywhere_equals_peft(
    base: str,
    checkpoints: Callable[[str], Any],
    save_peft: Any,
    answers: Any,
    make_engine: Any,
    tmp_path: Path,
) -> None:
    checkpoint, prompts = checkpoints(base), prompts_of(answers)
    expected: dict[str, Any] = {}

    def use(model: Any) -> None:
        expected.update({name: answers.peft_answer(model, prompt, NEW_TOKENS) for name, prompt in prompts.items()})

    options = {**ALORA, "use_rslora": base == "llama3", "alora_invocation_tokens": INVOCATION}
    ref = AdapterRef(name="alora", path=str(save_peft(checkpoint, tmp_path / "alora", use=use, **options)))
    driver = make_engine(checkpoint, pages=200, prefill_chunk=16, max_batch_tokens=64)
    for name, prompt in prompts.items():
        driver.generate(name, prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
        driver.generate(f"base-{name}", prompt, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    for name, prompt in prompts.items():
        found = answers.engine_answer(driver.choices[name, 0])
        answers.assert_same(found, expected[name], tolerance=1e-4)
        of_base = answers.engine_answer(driver.choices[f"base-{name}", 0])
        start = len(prompt) if name in ("absent", "only-begun") else last_invocation(prompt)
        torch.testing.assert_close(found[1][: max(start - 1, 0)], of_base[1][: max(start - 1, 0)], rtol=0, atol=1e-5)
        if start < len(prompt):
            assert (found[1] - of_base[1])[max(start - 1, 0) :].abs().max() > 0.1
        else:
            answers.assert_same(found, of_base, tolerance=1e-5)
    driver.check_idle()


def last_invocation(prompt: list[int]) -> int:
    return max(i for i in range(len(prompt)) if prompt[i : i + len(INVOCATION)] == INVOCATION)


def test_an_invocation_that_the_model_says_itself_activates_nothing(
    llama: Any, save_peft: Any, answers: Any, make_engine: Any, tmp_path: Path
) -> None:
    driver, prompt = make_engine(llama, pages=200), filler(answers, 3, 18)
    driver.generate("base", prompt, max_tokens=NEW_TOKENS, logprobs=VOCAB)
    driver.run()
    said = next(token for token in driver.tokens("base")[:-1] if token not in prompt)
    folder = save_peft(llama, tmp_path / "alora", **ALORA, alora_invocation_tokens=[said])
    driver.generate("r", prompt, AdapterRef(name="a", path=str(folder)), max_tokens=NEW_TOKENS, logprobs=VOCAB)
    driver.run()
    found, expected = (answers.engine_answer(driver.choices[name, 0]) for name in ("r", "base"))
    answers.assert_same(found, expected, tolerance=1e-5)


def test_an_overlapping_invocation_starts_at_its_last_occurrence(
    llama: Any, save_peft: Any, answers: Any, make_engine: Any, tmp_path: Path
) -> None:
    prompt, expected = [*filler(answers, 2, 9), 7, 7, 7, 7, *filler(answers, 4, 5)], []
    folder = save_peft(
        llama,
        tmp_path / "a",
        use=lambda model: expected.append(answers.peft_answer(model, prompt, NEW_TOKENS)),
        **ALORA,
        alora_invocation_tokens=[7, 7],
    )
    driver = make_engine(llama, pages=200)
    ref = AdapterRef(name="a", path=str(folder))
    driver.generate("r", prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    answers.assert_same(answers.engine_answer(driver.choices["r", 0]), expected[0], tolerance=1e-4)
