"""The engine driven step by step: every request ends once, and every page comes back."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.server.errors import ContextLengthError, EngineError
from loraplex.server.messages import Abort, AdapterRef, LoadAdapter

Adapters = list[AdapterRef]
PROMPT = [7, 8, 9, 10, 11]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(length)]


def test_a_request_ends_once_with_all_its_tokens(llama: Any, make_engine: Any, hundred_adapters: Adapters) -> None:
    driver = make_engine(llama)
    driver.generate("base", PROMPT, max_tokens=9)
    driver.generate("adapted", PROMPT, hundred_adapters[0], max_tokens=9)
    driver.run()
    assert len(driver.tokens("base")) == len(driver.tokens("adapted")) == 9
    assert driver.tokens("base") != driver.tokens("adapted")
    assert driver.choices["base", 0].finish_reason == "length"
    driver.check_idle()


def test_stop_tokens_end_a_choice_and_are_part_of_it(llama: Any, make_engine: Any) -> None:
    driver = make_engine(llama)
    driver.generate("free", PROMPT, max_tokens=9)
    driver.run()
    tokens = driver.tokens("free")
    driver.generate("stopped", PROMPT, max_tokens=9, stop_token_ids=(tokens[4],))
    driver.run()
    first = tokens.index(tokens[4])
    assert driver.tokens("stopped") == tokens[: first + 1]
    assert driver.choices["stopped", 0].finish_reason == "stop"


def test_the_end_of_sequence_token_comes_from_the_checkpoint(llama: Any, make_engine: Any, tmp_path: Path) -> None:
    driver = make_engine(llama)
    driver.generate("free", PROMPT, max_tokens=9)
    driver.run()
    token = driver.tokens("free")[3]
    folder = shutil.copytree(llama.folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, token]}))
    ended = make_engine(type(llama)(folder, llama.model))
    ended.generate("a", PROMPT, max_tokens=9, ignore_eos=False)
    ended.generate("b", PROMPT, max_tokens=9, ignore_eos=True)
    ended.run()
    assert ended.tokens("a") == driver.tokens("free")[: driver.tokens("free").index(token) + 1]
    assert ended.tokens("b") == driver.tokens("free")


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_abort_is_the_last_of_a_request(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, steps: int
) -> None:
    driver = make_engine(llama, prefill_chunk=16)
    if steps > 1:  # else the request goes while its adapter is being read
        for ref in hundred_adapters[:2]:
            driver.handle(LoadAdapter(call_id=ref.name, adapter=ref))
        driver.run()
    driver.generate("gone", prompt_of(60), hundred_adapters[0], n=2, max_tokens=50)
    driver.generate("stays", PROMPT, hundred_adapters[1])
    for _ in range(steps):
        driver.step()
    driver.handle(Abort(request_id="gone"))
    driver.aborted.add("gone")
    driver.handle(Abort(request_id="never-was"))
    driver.run()
    assert len(driver.tokens("stays")) == 8
    driver.check_idle()


def test_one_choice_may_be_aborted_alone(llama: Any, make_engine: Any) -> None:
    driver = make_engine(llama)
    driver.generate("r", PROMPT, n=3, max_tokens=20, temperature=1.0, seed=1)
    driver.step_until(lambda: len(driver.choices["r", 1].tokens) > 2)
    driver.handle(Abort(request_id="r", index=1))
    driver.run()
    assert driver.choices["r", 1].finish_reason is None
    assert len(driver.tokens("r", 0)) == len(driver.tokens("r", 2)) == 20
    driver.check_idle()


def fail_once(monkeypatch: pytest.MonkeyPatch, driver: Any, method: str, at_call: int) -> None:
    """The runner's method raises at one of its calls, half of its work done."""
    runner, calls = driver.engine._parts.runner, iter(range(1000))
    original = getattr(runner, method)

    def run(*arguments: Any) -> Any:
        result = original(*arguments)
        if next(calls) == at_call:
            raise RuntimeError("a fault of the device")
        return result

    monkeypatch.setattr(runner, method, run)


@pytest.mark.parametrize(("method", "at_call"), [("launch", 0), ("launch", 3), ("page_in", 1)])
def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    llama: Any,
    make_engine: Any,
    hundred_adapters: Adapters,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    at_call: int,
) -> None:
    alone, driver = make_engine(llama), make_engine(llama, prefill_chunk=4)
    alone.generate("again", PROMPT, hundred_adapters[1], max_tokens=20)
    alone.run()
    fail_once(monkeypatch, driver, method, at_call)
    for i in range(3):
        driver.generate(f"r{i}", PROMPT, hundred_adapters[i], n=2, max_tokens=20)
    driver.step_until(lambda: bool(driver.failed))
    assert all(isinstance(error.to_error(), EngineError) for error in driver.failed.values())
    driver.run()
    assert len(driver.failed) + sum(choice.finish_reason is not None for choice in driver.choices.values()) // 2 == 3
    driver.check_idle()
    driver.generate("again", PROMPT, hundred_adapters[1], max_tokens=20)
    driver.run()
    assert driver.tokens("again") == alone.tokens("again")
    driver.check_idle()


def test_a_prompt_that_never_fits_is_refused_with_the_numbers(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    driver = make_engine(llama, pages=8)
    driver.generate("pool", prompt_of(8 * 16 + 1))
    driver.generate("context", prompt_of(300))
    driver.generate("beside", prompt_of(8 * 16 - 8), hundred_adapters[1])
    driver.generate("fits", prompt_of(8 * 16 - 3), max_tokens=20)
    driver.run()
    messages = {name: error.message for name, error in driver.failed.items()}
    assert set(messages) == {"pool", "context", "beside"}
    assert all(isinstance(error.to_error(), ContextLengthError) for error in driver.failed.values())
    assert "needs 9 pages, but the pool has 8" in messages["pool"]
    assert "300 tokens" in messages["context"]
    assert "256" in messages["context"]
    assert f"adapter '{hundred_adapters[1].name}' needs" in messages["beside"]
    assert len(driver.tokens("fits")) == 4
    driver.check_idle()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_equal_those_of_transformers(
    llama: Any, make_engine: Any, length: int, max_tokens: int
) -> None:
    prompt = prompt_of(length, seed=length)
    with torch.no_grad():
        expected = llama.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    driver = make_engine(llama, prefill_chunk=16)
    driver.generate("r", prompt, max_tokens=max_tokens, prompt_logprobs=3, n=2)
    driver.generate("other", prompt_of(40), prompt_logprobs=0)
    driver.run()
    found = driver.choices["r", 0].prompt_logprobs
    assert found[0] is None
    assert [entry.token_id for entry in found[1:]] == prompt[1:]
    for at, entry in enumerate(found[1:]):
        assert entry.logprob == pytest.approx(expected[at, prompt[at + 1]].item(), abs=1e-4)
        best = expected[at].topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert driver.choices["r", 1].prompt_logprobs is None
    assert [len(driver.tokens("r", index)) for index in (0, 1)] == [max_tokens] * 2
    assert len(driver.choices["other", 0].prompt_logprobs) == 40
    driver.check_idle()


def test_a_prompt_is_scored_under_its_adapter_across_preemptions(
    llama: Any, make_engine: Any, hundred_adapters: Adapters
) -> None:
    alone, crowd = make_engine(llama), make_engine(llama, pages=20, prefill_chunk=16)
    for i in range(8):
        for driver in (alone, crowd):
            driver.generate(f"r{i}", prompt_of(42, i), hundred_adapters[i], max_tokens=30, prompt_logprobs=1)
            if driver is alone:
                driver.run()
    crowd.run()
    assert crowd.engine.stats().preemptions > 0
    for i in range(8):
        mine, theirs = (driver.choices[f"r{i}", 0].prompt_logprobs[1:] for driver in (crowd, alone))
        assert [entry.logprob for entry in mine] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_choices_share_their_prompt_and_equal_single_requests(
    llama: Any, make_engine: Any, hundred_adapters: Adapters, length: int
) -> None:
    driver, prompt, n = make_engine(llama), prompt_of(length), 3
    driver.generate("r", prompt, hundred_adapters[2], n=n, max_tokens=12, temperature=1.0, seed=9)
    driver.run()
    cached = [driver.choices["r", index].cached_tokens for index in range(n)]
    assert cached == [0] + [(length - 1) // 16 * 16 if length % 16 == 0 else length // 16 * 16] * 2
    for index in range(n):
        single = make_engine(llama)
        single.generate("r", prompt, hundred_adapters[2], n=index + 1, max_tokens=12, temperature=1.0, seed=9)
        for other in range(index):
            single.handle(Abort(request_id="r", index=other))
        single.run()
        assert single.tokens("r", index) == driver.tokens("r", index)
    assert len({tuple(driver.tokens("r", index)) for index in range(n)}) == n
    driver.check_idle()


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"pool_bytes": 100}, "pool_bytes"),
        ({"pool_bytes": 1 << 50}, "pool_bytes"),
        ({"max_model_len": 1000}, "max_model_len"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_with_the_numbers(
    llama: Any, make_engine: Any, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(Exception, match=str(next(iter(settings.values())))) as caught:
        make_engine(llama, **settings)
    assert caught.value.param == param  # type: ignore[attr-defined]
