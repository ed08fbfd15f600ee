"""Adapters of every kind come and go under a pool that holds two of them; freed pages are filled with NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef, LoadAdapter, WeightedAdapter

VOCAB, NEW_TOKENS, KV_PAGES = 300, 4, 12
INVOCATION = [11, 12, 13]


@pytest.fixture
def refs(llama: Any, every_kind: Any) -> list[AdapterRef]:
    return [AdapterRef(name=name, path=str(path)) for name, path in every_kind(llama).items()]


def pages_of(driver: Any, refs: list[AdapterRef]) -> dict[str, int]:
    for ref in refs:
        driver.handle(LoadAdapter(call_id=ref.name, adapter=ref))
    driver.run()
    return {ref.name: driver.answers[ref.name].adapter.pages for ref in refs}


def prompt_of(answers: Any, seed: int) -> list[int]:
    return [*answers.random_prompt(seed, 7 + seed % 5), *INVOCATION, *answers.random_prompt(seed + 100, 4)]


def test_every_kind_pages_in_and_out_of_a_pool_that_holds_two(
    llama: Any, refs: list[AdapterRef], answers: Any, make_engine: Any
) -> None:
    large = make_engine(llama, pages=2000)
    pages = pages_of(large, refs)
    small = make_engine(llama, pages=sum(sorted(pages.values())[-2:]) + KV_PAGES, prefill_chunk=16, max_batch_tokens=48)
    rounds = 2
    for driver in (large, small):
        for round_ in range(rounds):
            for i, ref in enumerate(refs):
                prompt = prompt_of(answers, i + round_)
                driver.generate(f"{ref.name}-{round_}", prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB)
        driver.run()
    assert not large.failed | small.failed
    for round_ in range(rounds):
        for ref in refs:
            request_id = f"{ref.name}-{round_}"
            found, expected = (answers.engine_answer(driver.choices[request_id, 0]) for driver in (small, large))
            answers.assert_same(found, expected, tolerance=1e-5)
    stats = small.engine.stats()
    assert stats.adapter_evictions >= len(refs) - 2
    assert large.engine.stats().adapter_evictions == 0
    small.check_idle()


def test_a_page_that_held_another_kind_serves_the_next(
    llama: Any, refs: list[AdapterRef], answers: Any, plain: Any, make_engine: Any
) -> None:
    """One adapter at a time, each in the pages that all the others have left behind."""
    pages = pages_of(make_engine(llama, pages=2000), refs)
    driver = make_engine(llama, pages=max(pages.values()) + 3)
    mixtures = [ref for ref in refs if ref.name != "alora"]
    prompt = prompt_of(answers, 0)
    for round_, order in enumerate((mixtures, mixtures[::-1])):
        for ref in order:
            driver.generate(f"{ref.name}-{round_}", prompt, ref, max_tokens=NEW_TOKENS, logprobs=VOCAB)
            driver.run()
    assert not driver.failed
    for ref in mixtures:
        reference = plain.PlainModel(llama.model, [(plain.read_folder(ref.path), 1.0)])
        for round_ in range(2):
            answers.assert_plain(driver.choices[f"{ref.name}-{round_}", 0], reference, prompt)
    driver.check_idle()


def test_a_mix_pages_in_with_all_its_adapters_or_waits(
    llama: Any, refs: list[AdapterRef], answers: Any, plain: Any, make_engine: Any
) -> None:
    pages = pages_of(make_engine(llama, pages=2000), refs)
    by_name = {ref.name: ref for ref in refs}
    parts = ("mola", "tokenwise")
    driver = make_engine(llama, pages=sum(pages[name] for name in parts) + KV_PAGES)
    mix = [WeightedAdapter(adapter=by_name[name], weight=weight) for name, weight in zip(parts, (0.8, 0.5))]
    prompt = prompt_of(answers, 3)
    for i in range(4):
        driver.generate(f"mix-{i}", prompt, mix=mix, max_tokens=NEW_TOKENS, logprobs=VOCAB)
        other = [ref for ref in refs if ref.name not in parts and pages[ref.name] <= sum(pages[n] for n in parts)][i]
        driver.generate(f"other-{i}", prompt, other, max_tokens=NEW_TOKENS)
    driver.run()
    assert not driver.failed
    mixed = [(plain.read_folder(by_name[name].path), weight) for name, weight in zip(parts, (0.8, 0.5))]
    reference = plain.PlainModel(llama.model, mixed)
    for i in range(4):
        answers.assert_plain(driver.choices[f"mix-{i}", 0], reference, prompt)
    driver.check_idle()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves_every_kind_with_finite_numbers(
    checkpoints: Callable[[str], Any], refs: list[AdapterRef], llama: Any, answers: Any, make_engine: Any, dtype: str
) -> None:
    """Routes may flip, so the numbers are not compared; NaN of a freed page would show."""
    driver = make_engine(llama, pages=2000, dtype=dtype)
    for i, ref in enumerate(refs):
        driver.generate(ref.name, prompt_of(answers, i), ref, max_tokens=NEW_TOKENS, logprobs=VOCAB)
    driver.run()
    assert not driver.failed
    for ref in refs:
        assert answers.engine_answer(driver.choices[ref.name, 0])[1].isfinite().all()
    driver.check_idle()
