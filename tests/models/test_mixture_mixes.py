"""A weighted mix of adapters adds up, on every linear, what each of them changes there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef, WeightedAdapter

VOCAB, NEW_TOKENS = 300, 5
INVOCATION = [11, 12, 13]
MIXES: dict[str, list[tuple[str, float]]] = {
    "two-loras": [("lora", 0.7), ("rslora", 0.3)],
    "two-doras": [("dora", 0.5), ("dora-twin", 0.9)],
    "lora-and-dora": [("dora", 1.0), ("lora", -0.6)],
    "mola-and-lora": [("mola", 0.5), ("rslora", 0.8)],
    "loramoe-and-meteora": [("loramoe", 1.1), ("meteora", 0.4)],
    "tokenwise-and-dora": [("tokenwise", 0.9), ("dora", 0.2)],
    "tokenwise-and-mola": [("mola", -0.5), ("tokenwise", 0.7)],
    "embeddings-and-heads": [("embedding", 0.6), ("embedding-twin", 0.5), ("lora", 0.4)],
    "five": [("lora", 0.3), ("dora", 0.3), ("mola", 0.3), ("tokenwise", 0.3), ("loramoe", 0.3)],
    "one-of-half-weight": [("mola", 0.5)],
    "one-of-no-weight": [("dora", 0.0), ("lora", 1.0)],
}
EMBEDDING = {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
MORE: dict[str, dict[str, Any]] = {
    "dora-twin": {"r": 5, "target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True, "seed": 21},
    "embedding": {**EMBEDDING, "seed": 22},
    "embedding-twin": {**EMBEDDING, "seed": 23, "r": 2},
}


@pytest.fixture
def paths_of(every_kind: Any, save_peft: Any, tmp_path: Path) -> Callable[[Any], dict[str, Path]]:
    def get(checkpoint: Any) -> dict[str, Path]:
        return every_kind(checkpoint) | {
            name: save_peft(checkpoint, tmp_path / name, **options) for name, options in MORE.items()
        }

    return get


def weighted(paths: dict[str, Path], parts: list[tuple[str, float]]) -> list[WeightedAdapter]:
    return [WeightedAdapter(adapter=AdapterRef(name=name, path=str(paths[name])), weight=w) for name, w in parts]


@pytest.mark.parametrize("base", ["llama-biased", "llama3", "mistral"])
def test_mixes_of_one_batch_equal_the_plain_sum(
    base: str, checkpoints: Callable[[str], Any], paths_of: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    checkpoint = checkpoints(base)
    paths = paths_of(checkpoint)
    driver = make_engine(checkpoint, pages=700, prefill_chunk=16, max_batch_tokens=64)
    prompts = {name: answers.random_prompt(i, 9 + 2 * i) for i, name in enumerate(MIXES)}
    for name, parts in MIXES.items():
        mix = weighted(paths, parts)
        driver.generate(name, prompts[name], mix=mix, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    for name, parts in MIXES.items():
        mixed = [(plain.read_folder(paths[part]), weight) for part, weight in parts]
        answers.assert_plain(driver.choices[name, 0], plain.PlainModel(checkpoint.model, mixed), prompts[name])
    driver.check_idle()


def test_doras_on_the_embedding_add_up(
    llama: Any, save_peft: Any, answers: Any, plain: Any, make_engine: Any, tmp_path: Path
) -> None:
    parts = [("dora", 0.7), ("dora-twin", -0.4), ("lora", 0.5)]
    paths = {
        name: save_peft(llama, tmp_path / name, seed=seed, **EMBEDDING, use_dora="dora" in name)
        for seed, (name, _) in enumerate(parts)
    }
    driver, prompt = make_engine(llama, pages=300), answers.random_prompt(6, 17)
    mix = weighted(paths, parts)
    driver.generate("mix", prompt, mix=mix, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    mixed = [(plain.read_folder(paths[name]), weight) for name, weight in parts]
    answers.assert_plain(driver.choices["mix", 0], plain.PlainModel(llama.model, mixed), prompt)


@pytest.mark.parametrize("kind", ["lora", "dora", "mola", "tokenwise"])
def test_halves_of_one_adapter_are_the_whole(
    kind: str, llama: Any, every_kind: Any, answers: Any, make_engine: Any
) -> None:
    paths, prompt = every_kind(llama), answers.random_prompt(4, 26)
    driver = make_engine(llama, pages=300)
    whole = AdapterRef(name=kind, path=str(paths[kind]))
    mixes = {"one": [(kind, 1.0)], "halves": [(kind, 0.5), (kind, 0.5)]}
    driver.generate("whole", prompt, whole, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    for name, parts in mixes.items():
        mix = weighted(paths, parts)
        driver.generate(name, prompt, mix=mix, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    expected = answers.engine_answer(driver.choices["whole", 0])
    for name in mixes:
        answers.assert_same(answers.engine_answer(driver.choices[name, 0]), expected, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["mixlora", "mixdora", "alora"])
def test_what_cannot_be_part_of_a_mix_is_refused_by_name(
    kind: str, llama: Any, every_kind: Any, answers: Any, make_engine: Any
) -> None:
    paths, driver = every_kind(llama), make_engine(llama, pages=400)
    prompt = [*answers.random_prompt(4, 9), *INVOCATION]
    driver.generate("mix", prompt, mix=weighted(paths, [("lora", 0.5), (kind, 0.5)]))
    driver.generate("base", prompt)
    driver.run()
    error = driver.failed["mix"].to_error()
    assert (error.param, kind in error.message) == ("adapter_id", True)
    assert len(driver.tokens("base")) == 8
    driver.check_idle()


def test_a_mix_with_a_broken_adapter_names_it_and_fails_alone(
    llama: Any, every_kind: Any, answers: Any, make_engine: Any, tmp_path: Path
) -> None:
    paths, driver = every_kind(llama) | {"absent": tmp_path / "absent"}, make_engine(llama, pages=300)
    prompt = answers.random_prompt(4, 9)
    driver.generate("broken", prompt, mix=weighted(paths, [("lora", 0.5), ("absent", 0.5)]))
    driver.generate("whole", prompt, mix=weighted(paths, [("lora", 0.5), ("dora", 0.5)]))
    driver.run()
    assert set(driver.failed) == {"broken"}
    assert "absent" in driver.failed["broken"].message
    assert len(driver.tokens("whole")) == 8
    driver.check_idle()
