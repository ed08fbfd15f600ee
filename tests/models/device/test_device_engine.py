"""The engine over the GPU's kernels: the same answers as over plain operators, whatever a step is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

PROMPT = [7, 31, 5, 99, 12, 40]
INVOCATION = [11, 12, 13]

Checkpoints = Callable[[str], Any]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (length,), generator=random).tolist()


@pytest.mark.parametrize("base", ["small-llama", "small-tied", "small-biased", "small-mistral", "small-qwen2"])
def test_every_base(base: str, checkpoints: Checkpoints, compare: Any) -> None:
    requests = {
        "greedy": {"max_tokens": 6},
        "long": {"prompt": prompt_of(30), "max_tokens": 4},
        "random": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_tokens": 5},
    }
    compare(checkpoints(base), requests, prefill_chunk=8)


@pytest.mark.usefixtures("all_kernels")
@pytest.mark.parametrize("base", ["small-qwen2", "small-qwen3"])
def test_every_operator_by_its_kernel(base: str, checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    checkpoint = checkpoints(base)
    requests = {
        "long": {"prompt": prompt_of(14), "max_tokens": 2},
        "adapter": {"adapters": {"lora": 1.0}, "max_tokens": 2, "prompt_logprobs": 3},
    }
    compare(checkpoint, requests, small_kinds(checkpoint, "lora"), prefill_chunk=8)


def test_two_choices_and_scores_of_the_prompt(checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-llama")
    requests = {
        "two": {"adapters": {"lora": 1.0}, "n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 4},
        "scored": {"adapters": {"ends": 1.0}, "prompt_logprobs": 5, "prompt": prompt_of(18)},
        "only scored": {"adapters": {"lora": 0.5, "ends": 1.0}, "prompt_logprobs": 5, "max_tokens": 0},
        "base": {"prompt_logprobs": 0},
    }
    compare(base, requests, small_kinds(base, "lora", "ends"), prefill_chunk=8)


def test_penalties_beside_plain_sampling(checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-llama")
    requests = {
        "penalized": {"frequency_penalty": 1.5, "presence_penalty": 0.5, "max_tokens": 8},
        "repeats": {"adapters": {"lora": 1.0}, "repetition_penalty": 1.7, "max_tokens": 6, "temperature": 0.0},
        "plain": {"max_tokens": 7},
        "random": {"temperature": 1.0, "top_k": 9, "min_p": 0.02, "seed": 8, "max_tokens": 8},
        "biased": {"logit_bias": {17: 3.0, 4: -100.0}, "max_tokens": 5},
        "stops": {"stop_token_ids": tuple(range(0, 100, 3)), "min_tokens": 2, "max_tokens": 9},
    }
    compare(base, requests, small_kinds(base, "lora"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_any_number_of_rows_is_padded_to_a_bucket(
    rows: int, checkpoints: Checkpoints, small_kinds: Any, compare: Any
) -> None:
    base = checkpoints("small-llama")
    adapters: list[dict[str, float]] = [{"lora": 1.0}, {}, {"dora": 1.0}]
    requests = {
        f"r{i}": {"adapters": adapters[i % 3], "prompt": prompt_of(3 + i % 4, i), "max_tokens": 2 + i % 2}
        for i in range(rows)
    }
    compare(base, requests, small_kinds(base, "lora", "dora"), pages=100)


def test_prompts_that_begin_alike_share_pages(checkpoints: Checkpoints, small_kinds: Any, make_clients: Any) -> None:
    base, prompt = checkpoints("small-llama"), prompt_of(40)
    first = {"base": {"prompt": prompt}, "adapter": {"prompt": prompt, "adapters": {"lora": 1.0}}}
    second = {
        "base again": {"prompt": [*prompt[:36], 5, 6]},
        "adapter again": {"prompt": [*prompt[:33], 7], "adapters": {"lora": 1.0}},
        # Before its invocation it is the base, whose pages serve.
        "activated": {"prompt": [*prompt[:34], *INVOCATION, 9], "adapters": {"alora": 1.0}},
    }
    clients = make_clients(base, small_kinds(base, "lora", "alora"))
    found, expected = ([client.run(some) for some in (first, second)] for client in clients)
    assert {key[0]: said.cached_tokens for key, said in found[1].items()} == dict.fromkeys(second, 32)
    for one, other in zip(found, expected):
        assert_all(one, other)


def assert_all(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    for key, said in found.items():
        other = expected[key]
        assert (said.tokens, said.cached_tokens) == (other.tokens, other.cached_tokens)
        assert said.numbers == pytest.approx(other.numbers, abs=1e-4)


def test_preempted_sequences_go_on_where_they_were(checkpoints: Checkpoints, small_kinds: Any, compare: Any) -> None:
    base = checkpoints("small-llama")
    requests = {
        f"r{i}": {"prompt": prompt_of(5, i), "max_tokens": 24, "adapters": {"alora": 1.0} if i == 1 else {}}
        for i in range(6)
    }
    _, client = compare(base, requests, small_kinds(base, "alora"), pages=11, page_tokens=8)
    assert client.driver.engine.stats().preemptions > 0


def test_an_adapter_that_left_the_pool_is_paged_in_again(
    checkpoints: Checkpoints, small_kinds: Any, make_clients: Any, assert_alike: Any
) -> None:
    base = checkpoints("small-llama")
    kinds = ("lora", "dora", "mixlora")
    # By history adapters come back by themselves while a slow machine has nothing else to do.
    on_kernels, plain = make_clients(base, small_kinds(base, *kinds), pages=14, prefetch=False)
    for turn, kind in enumerate([*kinds, "lora"]):
        requests = {f"{kind} {turn}": {"adapters": {kind: 1.0}}, f"base {turn}": {}}
        assert_alike(on_kernels.run(requests), plain.run(requests))
    stats = on_kernels.driver.engine.stats()
    assert stats.adapter_evictions >= 2
    assert stats.adapter_loads == 4


def test_adapters_arrive_while_others_decode(
    checkpoints: Checkpoints, small_kinds: Any, make_clients: Any, assert_alike: Any
) -> None:
    base, kinds = checkpoints("small-llama"), ("lora", "dora", "ends")
    found = []
    for client in make_clients(base, small_kinds(base, *kinds)):
        client.send("base", {"max_tokens": 40})
        client.driver.step()
        for kind in kinds:
            client.send(kind, {"adapters": {kind: 1.0}, "max_tokens": 3})
            client.driver.step()
        found.append(client.run({}))
        found[-1] |= {key: choice.tokens for key, choice in client.driver.choices.items()}
    assert found[0] == found[1]
    assert len(found[0]["base", 0]) == 40


def test_bfloat16(checkpoints: Checkpoints, small_kinds: Any, make_clients: Any) -> None:
    base, kinds = checkpoints("small-llama"), ("lora", "dora", "ends")
    requests: dict[str, Any] = {kind: {"adapters": {kind: 1.0}, "max_tokens": 1, "logprobs": 100} for kind in kinds}
    requests["base"] = {"max_tokens": 1, "logprobs": 100}
    scores = []
    for client in make_clients(base, small_kinds(base, *kinds), dtype="bfloat16"):
        client.run(requests)
        top = [client.driver.choices[name, 0].logprobs[0].top for name in sorted(requests)]
        scores.append(torch.tensor([[score for _, score in sorted(entries)] for entries in top]))
    error = (scores[0] - scores[1]).square().mean().sqrt()
    assert 0 < error < 0.03


@pytest.mark.usefixtures("ordered_dots")
def test_a_row_has_the_same_bits_whatever_its_neighbours_are(
    checkpoints: Checkpoints, small_kinds: Any, make_clients: Any
) -> None:
    base, kinds = checkpoints("small-llama"), ("lora", "dora", "rslora", "mixlora")
    mine = {"adapters": {"lora": 1.0}, "prompt": PROMPT}
    crowds: list[list[dict[str, float]]] = [
        [{}, {}, {}],
        [{"lora": 1.0}, {"dora": 1.0}, {"rslora": 1.0}],
        [{"mixlora": 1.0}, {"lora": 1.0, "dora": 0.5}, {}],
    ]
    client, _ = make_clients(base, small_kinds(base, *kinds), prefix_caching=False)
    found = []
    for turn, crowd in enumerate(crowds):
        others = {f"r{i} {turn}": {"adapters": of, "prompt": prompt_of(5, i)} for i, of in enumerate(crowd)}
        found.append(client.run({**others, f"mine {turn}": mine})[f"mine {turn}", 0])
    assert found[0].numbers == found[1].numbers == found[2].numbers
    assert found[0].tokens == found[1].tokens == found[2].tokens


def test_decoding_is_replayed_from_graphs(
    checkpoints: Checkpoints, small_kinds: Any, compare: Any, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("only a GPU has graphs")
    base = checkpoints("small-llama")
    requests = {"base": {"max_tokens": 6}, "adapter": {"adapters": {"mola": 1.0}, "max_tokens": 6}}
    _, client = compare(base, requests, small_kinds(base, "mola"))
    programs = client.driver.engine._parts.runner._programs
    assert any(capacities.linear is not None and program.is_captured for capacities, program in programs.items())
