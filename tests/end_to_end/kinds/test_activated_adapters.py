"""Activated LoRA over HTTP: the K/V of a long prefix is computed once for the base and every adapter behind it."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import pytest

USER = 260
PAGE = 16
HITS = "loraplex_prefix_hit_tokens_total"


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A system message of 90 letters that no other test sends."""
    letters = random.Random(request.node.name)
    return "<|bos|><|system|>" + "".join(letters.choice(string.ascii_lowercase) for _ in range(90)) + "<|eos|>"


@pytest.fixture
def activated(load: Any, copy_adapter: Any) -> dict[str, Any]:
    """Two of the demo's adapters, taught to act from the last question on; their folders by name."""
    folders = {}
    for name in ("reverse", "spell"):
        folder = copy_adapter(name, to=f"late-{name}")
        folder.edit_config(alora_invocation_tokens=[USER])
        assert load(f"late-{name}", folder.path).status_code == 200
        folders[f"late-{name}"] = folder.path
    return folders


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


@pytest.fixture
def prompt(prefix: str, encode: Any) -> list[int]:
    return list(encode(f"{prefix}<|user|>kernel<|eos|><|assistant|>"))


@pytest.fixture
def models(activated: dict[str, Any], bare_model: Any, peft_model: Any) -> dict[str | None, Any]:
    """The same in transformers and PEFT."""
    return {None: bare_model(), **{name: peft_model(path) for name, path in activated.items()}}


def test_the_base_and_two_adapters_share_the_prefix_and_say_what_peft_says(
    models: dict[str | None, Any],
    prefix: str,
    prompt: list[int],
    generate: Any,
    encode: Any,
    top_of: Any,
    assert_near: Any,
) -> None:
    shared = len(encode(prefix)) // PAGE * PAGE
    found = {}
    for name, expected_cached in ((None, 0), ("late-reverse", shared), ("late-spell", shared)):
        answer, told = generate(prompt, adapter_id=name)
        assert cached(answer) == expected_cached
        ids = [*prompt, *(encode(answer.choices[0].text))]
        assert_near(told, top_of(models[name], ids)[len(prompt) - 1 : -1])
        found[name] = told
    assert min((found[None] - told).abs().max() for name, told in found.items() if name) > 0.1


def test_cached_answers_are_the_uncached_ones(
    activated: dict[str, Any], prompt: list[int], generate: Any, served_top: Any, encode: Any, assert_near: Any
) -> None:
    """A request for the prompt's own log-probabilities computes all of it."""
    for name in (*activated, *reversed(activated)):
        answer, told = generate(prompt, adapter_id=name)
    assert cached(answer) >= len(prompt) // PAGE * PAGE - PAGE > 0
    whole = served_top([*prompt, *encode(answer.choices[0].text)], adapter_id=name)
    assert_near(told, whole[len(prompt) - 1 :], 1e-4)


def test_a_plain_adapter_finds_only_what_it_computed_itself(prompt: list[int], generate: Any) -> None:
    first = [cached(generate(prompt, adapter_id=name)[0]) for name in (None, "reverse", "spell", "words-mixlora")]
    again = [cached(generate(prompt, adapter_id=name)[0]) for name in (None, "reverse", "spell", "words-mixlora")]
    assert first == [0] * 4
    assert again == [(len(prompt) - 1) // PAGE * PAGE] * 4


def test_what_was_cached_under_a_name_is_gone_with_its_content(
    load: Any, copy_adapter: Any, prompt: list[int], generate: Any, assert_near: Any
) -> None:
    folder = copy_adapter("reverse")
    assert load("changing", folder.path).status_code == 200
    for _ in range(2):
        before, _ = generate(prompt, adapter_id="changing")
    assert cached(before) > 0
    folder.become("spell")
    assert load("changing", folder.path, load_inplace=True).status_code == 200
    after, told = generate(prompt, adapter_id="changing")
    assert cached(after) == 0
    expected, expected_told = generate(prompt, adapter_id="spell")
    assert (after.choices[0].text, cached(expected)) == (expected.choices[0].text, (len(prompt) - 1) // PAGE * PAGE)
    assert_near(told, expected_told, 1e-4)


def test_tokens_that_were_found_are_counted(
    demo: Any, prompt: list[int], generate: Any, wait_until: Callable[..., bool]
) -> None:
    generate(prompt)
    assert wait_until(lambda: demo.is_idle() and demo.metrics().value("loraplex_pool_pages", use="cached") > 0)
    before = demo.metrics()
    found = sum(cached(generate(prompt)[0]) for _ in range(3))
    assert found == 3 * ((len(prompt) - 1) // PAGE * PAGE)
    assert wait_until(lambda: demo.metrics().value(HITS) - before.value(HITS) == found)


def test_an_activated_adapter_is_refused_in_a_mix(demo: Any, activated: dict[str, Any]) -> None:
    parts = [{"id": name, "weight": 0.5} for name in (*activated, "upper")]
    refused = demo.post("/v1/completions", {"prompt": "a", "adapter_id": {"adapters": parts}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter_id")
    assert "late-reverse" in refused.json()["error"]["message"]
    assert demo.ask("loraplex", "upper") == "LORAPLEX"


def test_an_invocation_of_no_token_of_the_base_is_refused(load: Any, copy_adapter: Any) -> None:
    folder = copy_adapter("reverse")
    for tokens in ([272], [-1], [], ["<|user|>"]):
        folder.edit_config(alora_invocation_tokens=tokens)
        refused = load("late", folder.path)
        assert refused.status_code == 400, tokens
        assert "alora_invocation_tokens" in refused.json()["error"]["message"]
