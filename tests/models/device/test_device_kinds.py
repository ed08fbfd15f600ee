"""Adapters of every kind over the GPU's kernels: the same answers as over plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

PROMPT = [7, 31, 5, 99, 12, 40]
INVOCATION = [11, 12, 13]
KINDS = ("lora", "rslora", "dora", "alora", "mixlora", "mixdora", "mola", "loramoe", "meteora", "tokenwise", "ends")

Checkpoints = Callable[[str], Any]


def test_every_kind_is_among_these(small_kind_names: list[str]) -> None:
    assert set(KINDS) == set(small_kind_names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_beside_base_rows(kind: str, checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base, prompt = checkpoints("small-llama"), [*PROMPT, *INVOCATION, 50]
    requests = {
        "base": {"prompt": prompt},
        "adapter": {"adapters": {kind: 1.0}, "prompt": prompt},
        "again": {"adapters": {kind: 1.0}, "prompt": [80, *INVOCATION]},
    }
    said, _ = compare(base, requests, small_kinds(base, kind))
    assert said["adapter", 0].numbers != pytest.approx(said["base", 0].numbers, abs=0.01)


@pytest.mark.parametrize("kind", ["ends", "tokenwise"])
def test_tied_embeddings(kind: str, checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-tied")
    requests = {"base": {}, "adapter": {"adapters": {kind: 1.0}}, "weaker": {"adapters": {kind: 0.5}}}
    said, _ = compare(base, requests, small_kinds(base, kind))
    assert said["adapter", 0].numbers != pytest.approx(said["weaker", 0].numbers, abs=0.01)


@pytest.mark.parametrize("kind", ["dora", "mixlora", "loramoe"])
def test_biased_linears(kind: str, checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-biased")
    compare(base, {"base": {}, "adapter": {"adapters": {kind: 1.0}}}, small_kinds(base, kind))


def test_mixes(checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-llama")
    requests = {
        "two": {"adapters": {"lora": 0.7, "dora": 0.3}},
        "routed": {"adapters": {"mola": 0.5, "tokenwise": -0.3, "rslora": 0.4}, "prompt": [*PROMPT, 3]},
        "ends": {"adapters": {"ends": 1.5, "lora": -1.0}},
        "one": {"adapters": {"lora": 1.0}, "prompt": PROMPT[::-1]},
    }
    compare(base, requests, small_kinds(base, "lora", "dora", "mola", "tokenwise", "rslora", "ends"))


def test_all_kinds_in_one_batch(checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-llama")
    requests = {kind: {"adapters": {kind: 1.0}, "prompt": [*INVOCATION, 60 - i]} for i, kind in enumerate(KINDS)}
    requests |= {
        "base": {"prompt": PROMPT},
        "mix": {"adapters": {"lora": 0.7, "mola": 0.3}, "prompt": PROMPT[:3]},
        "another mix": {"adapters": {"ends": 0.5, "dora": -0.5}, "prompt": PROMPT[3:5]},
    }
    compare(base, requests, small_kinds(base, *KINDS), pages=400)


@pytest.mark.parametrize("kind", ["mixlora", "mola", "tokenwise"])
def test_routes_are_those_of_the_plain_path(
    kind: str, checkpoints: Checkpoints, small_kinds: Any, compare: Any
) -> None:
    base, prompt = checkpoints("small-llama"), [*PROMPT, 30, 31]
    requests = {
        "routed": {"adapters": {kind: 1.0}, "prompt": prompt, "return_routing": True},
        "silent": {"adapters": {kind: 1.0}, "prompt": PROMPT},
        "base": {"return_routing": True},
    }
    said, _ = compare(base, requests, small_kinds(base, kind), prefill_chunk=5)
    computed = sum(len(experts) for _, _, site, _, experts in said["routed", 0].routes if site != "down_proj")
    assert computed == len(prompt) + 1
    assert not said["silent", 0].routes
    assert not said["base", 0].routes


def test_experts_are_counted(checkpoints: Checkpoints, small_kinds: Any, make_clients: Any) -> None:
    base = checkpoints("small-llama")
    requests = {
        "one": {"adapters": {"mixlora": 1.0}},
        "two": {"adapters": {"tokenwise": 0.5}, "prompt": PROMPT[:4]},
        "base": {},
    }
    counted = []
    for client in make_clients(base, small_kinds(base, "mixlora", "tokenwise"), expert_metrics=2):
        client.run(requests)
        counted.append(client.driver.engine.stats().expert_tokens)
    assert set(counted[0]) == {"mixlora", "tokenwise"}
    assert counted[0] == counted[1]
