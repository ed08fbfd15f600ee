"""``return_routing`` tells the experts that every router chose, for every token that was computed, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.server.messages import AdapterRef, WeightedAdapter

NEW_TOKENS = 5
ROUTED = ["mixlora", "mixlora-dynamic", "mixlora-switch", "mixdora", "mola", "loramoe", "meteora", "tokenwise"]

Routes = dict[tuple[int | None, str], list[list[tuple[int, float]]]]


def reported_routes(choice: Any, adapter: str) -> Routes:
    """By layer and site, for each token; fails where a token is left out or told twice."""
    found: dict[tuple[int | None, str], dict[int, list[tuple[int, float]]]] = {}
    for entry in choice.routing:
        if entry.adapter == adapter:
            tokens = found.setdefault((entry.layer, entry.site), {})
            assert len(entry.experts) == len(entry.weights)
            for position, (experts, weights) in enumerate(zip(entry.experts, entry.weights), start=entry.start):
                assert position not in tokens, f"{entry.layer} {entry.site}: token {position} is told twice"
                tokens[position] = list(zip(experts, weights, strict=True))
    assert all(sorted(tokens) == list(range(len(tokens))) for tokens in found.values())
    return {place: [tokens[i] for i in range(len(tokens))] for place, tokens in found.items()}


def site_of(layer: int | None, site: str | None) -> str:
    return site or ("token" if layer is None else "mlp")


def assert_routes(found: Routes, expected: dict[Any, Any]) -> None:
    by_site = {(layer, site_of(layer, site)): routes for (layer, site), routes in expected.items()}
    assert set(found) == set(by_site)
    for place, routes in by_site.items():
        assert len(found[place]) == len(routes), place
        for told, route in zip(found[place], routes):
            assert [expert for expert, _ in told] == [expert for expert, _ in route], place
            assert [weight for _, weight in told] == pytest.approx([weight for _, weight in route], abs=1e-5)


@pytest.mark.parametrize("kind", ROUTED)
def test_the_routes_told_are_those_of_the_plain_reference(
    kind: str, llama: Any, every_kind: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    folder, prompt = every_kind(llama)[kind], answers.random_prompt(3, 14)
    driver = make_engine(llama, pages=200, prefill_chunk=8, max_batch_tokens=16)
    ref = AdapterRef(name=kind, path=str(folder))
    driver.generate("told", prompt, ref, max_tokens=NEW_TOKENS, return_routing=True)
    driver.generate("not-told", prompt, ref, max_tokens=NEW_TOKENS)
    driver.run()
    assert not driver.failed
    expected = plain.plain_answer(llama.model, [(folder, 1.0)], [*prompt, *driver.tokens("told")[:-1]])
    assert_routes(reported_routes(driver.choices["told", 0], kind), expected.routes)
    assert not driver.choices["not-told", 0].routing
    assert driver.tokens("not-told") == driver.tokens("told")


def test_a_batch_of_all_kinds_tells_each_request_its_own_routes(
    llama: Any, every_kind: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    paths = every_kind(llama)
    prompts = {name: answers.random_prompt(i, 9 + 2 * i) for i, name in enumerate(["base", *paths])}
    driver = make_engine(llama, pages=700, prefill_chunk=16, max_batch_tokens=64)
    for name, prompt in prompts.items():
        ref = AdapterRef(name=name, path=str(paths[name])) if name in paths else None
        driver.generate(name, prompt, ref, max_tokens=NEW_TOKENS, return_routing=True)
    driver.run()
    assert not driver.failed
    for name, prompt in prompts.items():
        told = reported_routes(driver.choices[name, 0], name)
        assert sum(len(entry.experts) for entry in driver.choices[name, 0].routing) == sum(map(len, told.values()))
        if name in ROUTED:
            tokens = [*prompt, *driver.tokens(name)[:-1]]
            assert_routes(told, plain.plain_answer(llama.model, [(paths[name], 1.0)], tokens).routes)
        else:
            assert not told


def test_a_mix_tells_the_routes_of_each_of_its_adapters(
    llama: Any, every_kind: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    paths: dict[str, Path] = every_kind(llama)
    parts, prompt = ("mola", "tokenwise"), answers.random_prompt(8, 19)
    driver = make_engine(llama, pages=300)
    mix = [WeightedAdapter(adapter=AdapterRef(name=name, path=str(paths[name])), weight=0.5) for name in parts]
    driver.generate("r", prompt, mix=mix, max_tokens=NEW_TOKENS, return_routing=True)
    driver.run()
    assert not driver.failed
    tokens = [*prompt, *driver.tokens("r")[:-1]]
    expected = plain.plain_answer(llama.model, [(paths[name], 0.5) for name in parts], tokens).routes
    assert_routes(reported_routes(driver.choices["r", 0], "tokenwise"), {(None, None): expected[None, None]})
    told = reported_routes(driver.choices["r", 0], "mola")
    assert_routes(told, {place: routes for place, routes in expected.items() if place != (None, None)})


@pytest.mark.parametrize("kind", ["mola", "tokenwise"])
def test_one_adapter_under_several_weights_tells_each_request_its_own_routes(
    kind: str, llama: Any, every_kind: Any, answers: Any, plain: Any, make_engine: Any
) -> None:
    path = every_kind(llama)[kind]
    weights = (0.4, 1.0, -0.3, 1.0)
    prompts = [answers.random_prompt(i, 8 + 3 * i) for i in range(len(weights))]
    driver = make_engine(llama, pages=300)
    for i, weight in enumerate(weights):
        mix = [WeightedAdapter(adapter=AdapterRef(name=kind, path=str(path)), weight=weight)]
        driver.generate(f"r{i}", prompts[i], mix=mix, max_tokens=NEW_TOKENS, return_routing=True)
    driver.run()
    assert not driver.failed
    for i, weight in enumerate(weights):
        expected = plain.plain_answer(llama.model, [(path, weight)], [*prompts[i], *driver.tokens(f"r{i}")[:-1]])
        assert_routes(reported_routes(driver.choices[f"r{i}", 0], kind), expected.routes)


def test_a_preempted_sequence_tells_no_token_twice(llama: Any, every_kind: Any, answers: Any, make_engine: Any) -> None:
    paths = every_kind(llama)
    measure = make_engine(llama, pages=700)
    ref = AdapterRef(name="mola", path=str(paths["mola"]))
    measure.generate("r", answers.random_prompt(0, 12), ref, max_tokens=1)
    measure.run()
    driver = make_engine(llama, pages=measure.engine.stats().pages_adapter + 6)
    for i in range(4):
        driver.generate(f"r{i}", answers.random_prompt(i, 12), ref, max_tokens=24, return_routing=True)
    driver.run()
    assert not driver.failed
    assert driver.engine.stats().preemptions > 0
    for i in range(4):
        told = reported_routes(driver.choices[f"r{i}", 0], "mola")
        assert told
        assert all(len(tokens) == 12 + 24 - 1 for tokens in told.values())
