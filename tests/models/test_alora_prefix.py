"""The base's K/V of a prefix serves every activated LoRA over it, and nobody else's K/V serves anyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef

VOCAB, NEW_TOKENS, PAGE = 300, 5, 16
INVOCATIONS = {"first": [11, 12, 13], "second": [14, 15]}
ALORA = {"r": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Prefixed:
    """Prompts over one long prefix, adapters with invocations of their own, and what PEFT answers to each."""

    def __init__(self, base: Any, answers: Any, save_peft: Any, root: Path) -> None:
        self.prefix = [token if token > 20 else token + 50 for token in answers.random_prompt(0, 75)]
        tail = [token if token > 20 else token + 50 for token in answers.random_prompt(1, 30)]
        self.prompts = {name: [*self.prefix, *tokens, *tail] for name, tokens in INVOCATIONS.items()}
        self.prompts["base"] = [*self.prefix, *tail]
        self.prompts["lora"] = self.prompts["base"]
        self.expected = {"base": answers.peft_answer(base.model, self.prompts["base"], NEW_TOKENS)}
        self.refs: dict[str, AdapterRef | None] = {"base": None}
        for seed, name in enumerate((*INVOCATIONS, "lora"), start=40):

            def use(model: Any, name: str = name) -> None:
                self.expected[name] = answers.peft_answer(model, self.prompts[name], NEW_TOKENS)

            options = {**ALORA} if name == "lora" else {**ALORA, "alora_invocation_tokens": INVOCATIONS[name]}
            self.refs[name] = AdapterRef(
                name=name, path=str(save_peft(base, root / name, seed=seed, use=use, **options))
            )

    def submit(self, driver: Any, name: str, request_id: str | None = None) -> None:
        prompt = self.prompts[name]
        driver.generate(request_id or name, prompt, self.refs[name], max_tokens=NEW_TOKENS, logprobs=VOCAB)


@pytest.fixture
def prefixed(llama: Any, answers: Any, save_peft: Any, tmp_path: Path) -> Prefixed:
    return Prefixed(llama, answers, save_peft, tmp_path)


def assert_answers(prefixed: Prefixed, driver: Any, answers: Any, name: str, request_id: str | None = None) -> int:
    """The answer is PEFT's; returns how many tokens were not computed for it."""
    choice = driver.choices[request_id or name, 0]
    tokens, logprobs = prefixed.expected[name]
    answers.assert_same(answers.engine_answer(choice), (tokens, logprobs[-NEW_TOKENS:]), tolerance=1e-4)
    return int(choice.cached_tokens)


@pytest.mark.parametrize(
    "order", [("base", "first", "second"), ("first", "second", "base"), ("second", "base", "first")]
)
def test_the_pages_before_the_invocation_are_shared_whoever_comes_first(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any, order: tuple[str, ...]
) -> None:
    driver = make_engine(llama, pages=300)
    cached = []
    for name in order:
        prefixed.submit(driver, name)
        driver.run()
        cached.append(assert_answers(prefixed, driver, answers, name))
    whole_pages = len(prefixed.prefix) // PAGE * PAGE
    assert cached == [0, whole_pages, whole_pages]
    driver.check_idle()


def test_one_step_holds_base_rows_and_rows_of_two_activated_adapters(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any
) -> None:
    driver = make_engine(llama, pages=300, prefill_chunk=16, max_batch_tokens=64)
    for name in prefixed.prompts:
        prefixed.submit(driver, name)
    driver.run()
    assert not driver.failed
    for name in prefixed.prompts:
        assert_answers(prefixed, driver, answers, name)
    driver.check_idle()


def test_the_same_request_again_finds_the_adapters_own_pages_too(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any
) -> None:
    driver = make_engine(llama, pages=300)
    for request_id in ("once", "again"):
        prefixed.submit(driver, "first", request_id)
        driver.run()
    assert assert_answers(prefixed, driver, answers, "first", "once") == 0
    cached = assert_answers(prefixed, driver, answers, "first", "again")
    assert cached == (len(prefixed.prompts["first"]) - 1) // PAGE * PAGE


def test_pages_behind_an_invocation_serve_neither_the_base_nor_another_adapter(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any
) -> None:
    """All ask for the very same tokens; only those before the invocation are common to two of them."""
    prompt = prefixed.prompts["first"]
    driver, fresh = make_engine(llama, pages=300), make_engine(llama, pages=300)
    before = len(prefixed.prefix) // PAGE * PAGE
    for name, expected_cached in (("first", 0), ("base", before), ("lora", 0)):
        driver.generate(name, prompt, prefixed.refs[name], max_tokens=NEW_TOKENS, logprobs=VOCAB)
        driver.run()
        fresh.generate(name, prompt, prefixed.refs[name], max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
        fresh.run()
        found = answers.engine_answer(driver.choices[name, 0])
        tokens, logprobs = answers.engine_answer(fresh.choices[name, 0])
        answers.assert_same(found, (tokens, logprobs[-NEW_TOKENS:]), tolerance=1e-5)
        assert driver.choices[name, 0].cached_tokens == expected_cached, name


def test_an_adapter_whose_invocation_is_absent_shares_all_the_bases_pages(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any
) -> None:
    driver = make_engine(llama, pages=300)
    prefixed.submit(driver, "base")
    driver.run()
    prompt = prefixed.prompts["base"]
    driver.generate("absent", prompt, prefixed.refs["second"], max_tokens=NEW_TOKENS, logprobs=VOCAB)
    driver.run()
    found, expected = (answers.engine_answer(driver.choices[name, 0]) for name in ("absent", "base"))
    answers.assert_same(found, expected, tolerance=1e-5)
    assert driver.choices["absent", 0].cached_tokens == (len(prompt) - 1) // PAGE * PAGE


def test_a_pool_that_holds_little_keeps_shared_prefixes_right(
    prefixed: Prefixed, llama: Any, answers: Any, make_engine: Any
) -> None:
    """Pages of adapters and cached prefixes drive one another out; freed ones are filled with NaN."""
    measure = make_engine(llama, pages=300)
    prefixed.submit(measure, "first")
    measure.run()
    driver = make_engine(llama, pages=measure.engine.stats().pages_adapter + 14)
    for i in range(3):
        for name in prefixed.prompts:
            prefixed.submit(driver, name, f"{name}-{i}")
    driver.run()
    assert not driver.failed
    for i in range(3):
        for name in prefixed.prompts:
            assert_answers(prefixed, driver, answers, name, f"{name}-{i}")
    driver.check_idle()
