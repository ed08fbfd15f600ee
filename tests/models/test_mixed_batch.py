"""One batch of every kind of adapter, mixes of them and base-only rows: nobody's answer depends on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef, LoadAdapter, WeightedAdapter

VOCAB, NEW_TOKENS = 300, 3
INVOCATION = [11, 12, 13]
MIXES: dict[str, dict[str, float]] = {
    "lora+dora": {"lora": 0.7, "dora": 0.3},
    "mola+tokenwise+rslora": {"mola": 0.5, "tokenwise": -0.3, "rslora": 0.4},
}


def ref_of(name: str, paths: dict[str, Path]) -> AdapterRef:
    return AdapterRef(name=name, path=str(paths[name]))


def submit(driver: Any, name: str, prompt: list[int], paths: dict[str, Path]) -> None:
    """A request under an adapter, a mix, or, by any other name, the base."""
    mix = [WeightedAdapter(adapter=ref_of(part, paths), weight=w) for part, w in MIXES.get(name, {}).items()]
    adapter = ref_of(name, paths) if name in paths else None
    driver.generate(
        name,
        prompt,
        adapter,
        mix=mix,
        max_tokens=NEW_TOKENS,
        logprobs=VOCAB,
        prompt_logprobs=VOCAB,
        return_routing=False,
    )


def prompts_of(names: list[str], answers: Any) -> dict[str, list[int]]:
    """Of different lengths; the invocation stands in each of them."""
    prompts = {}
    for i, name in enumerate(names):
        prompt = answers.random_prompt(i, 8 + 3 * i)
        prompts[name] = [*prompt[: i + 3], *INVOCATION, *prompt[i + 3 :]]
    return prompts


def run_all(driver: Any, prompts: dict[str, list[int]], paths: dict[str, Path]) -> int:
    """Run all requests together, with all adapters on the host; returns how many ran at once."""
    for name in prompts:
        if name in paths:
            driver.handle(LoadAdapter(call_id=f"{name} for {len(prompts)}", adapter=ref_of(name, paths)))
    driver.run()
    for name, prompt in prompts.items():
        submit(driver, name, prompt, paths)
    most_running = 0
    while driver.engine.has_work:
        driver.step()
        most_running = max(most_running, driver.engine.stats().running)
    assert not driver.failed
    driver.check_idle()
    return most_running


@pytest.mark.parametrize("base", ["llama", "mistral", "qwen2"])
def test_a_batch_of_all_kinds_equals_each_request_alone(
    base: str, checkpoints: Callable[[str], Any], every_kind: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    checkpoint = checkpoints(base)
    paths = every_kind(checkpoint)
    prompts = prompts_of(["base", *paths, *MIXES, "another-base"], answers)
    alone = make_engine(checkpoint, pages=700)
    for name, prompt in prompts.items():
        assert run_all(alone, {name: prompt}, paths) == 1
    together = make_engine(checkpoint, pages=700)
    assert run_all(together, prompts, paths) == len(prompts)
    in_small_steps = make_engine(checkpoint, pages=700, max_batch_tokens=24, prefill_chunk=16)
    assert run_all(in_small_steps, prompts, paths) > 3

    for name, prompt in prompts.items():
        expected = answers.engine_answer(alone.choices[name, 0])
        for driver in (together, in_small_steps):
            answers.assert_same(answers.engine_answer(driver.choices[name, 0]), expected, tolerance=1e-5)
        if name != "alora":
            parts = MIXES.get(name, {name: 1.0} if name in paths else {})
            mix = [(plain.read_folder(paths[part]), weight) for part, weight in parts.items()]
            answers.assert_plain(alone.choices[name, 0], plain.PlainModel(checkpoint.model, mix), prompt)
