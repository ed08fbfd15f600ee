"""What routers chose: in answers that ask for it, and counted in ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from loraplex.server.demo.mixture_layers import routers
from loraplex.server.demo.scoring import raw_prompt

NUM_EXPERTS = 4
NUM_NEW = 4
PROMPTS = {"words-mixlora": raw_prompt("kernel", "spell"), "words-tokenwise": raw_prompt("secret", "caesar")}
PLACES = {"words-mixlora": [(layer, "mlp") for layer in range(5)], "words-tokenwise": [(None, "token")]}

Routes = dict[tuple[int | None, str], torch.Tensor]
"""By layer and site: the weight of each expert, ``[tokens, experts]``, zero where it was not chosen."""


@pytest.fixture(params=PROMPTS)
def mixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(client: Any) -> Callable[..., Any]:
    def complete(adapter: str | None, prompt: str, **options: Any) -> Any:
        extra = {"adapter_id": adapter, "return_routing": True, "ignore_eos": True, **options.pop("extra_body", {})}
        return client.completions.create(
            model="loraplex-demo",
            prompt=prompt,
            **{"max_tokens": NUM_NEW, "temperature": 0, **options},
            extra_body=extra,
        )

    return complete


def dense(runs: Iterable[dict[str, Any]], adapter: str, first: int = 0) -> Routes:
    """The runs of one choice, which must follow one another without gaps from the ``first`` token on."""
    rows: dict[tuple[int | None, str], list[list[float]]] = {}
    for run in runs:
        assert run["adapter"] == adapter
        found = rows.setdefault((run["layer"], run["site"]), [])
        assert run["start"] == first + len(found)
        for experts, weights in zip(run["experts"], run["weights"], strict=True):
            chosen = dict(zip(experts, weights, strict=True))
            assert sorted(chosen.values(), reverse=True) == list(chosen.values())
            found.append([chosen.get(expert, 0.0) for expert in range(NUM_EXPERTS)])
    return {place: torch.tensor(values) for place, values in rows.items()}


def own_routes(model: Any, ids: list[int], adapter: str) -> Routes:
    """What the routers of the plain program say."""
    found: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, weights: found.append(weights[0]))
        for router in routers(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return dict(zip(PLACES[adapter], found, strict=True))


def assert_same_routes(found: Routes, expected: Routes) -> None:
    assert found.keys() == expected.keys()
    for place, weights in expected.items():
        torch.testing.assert_close(found[place], weights, rtol=0, atol=1e-4)


def test_routes_of_prompt_and_answer_are_those_of_the_plain_program(
    ask: Any, reference: Any, encode: Any, mixture: str
) -> None:
    choice = ask(mixture, PROMPTS[mixture]).choices[0]
    ids = encode(PROMPTS[mixture] + choice.text)[:-1]  # nothing was computed for the last token
    assert len(ids) == len(encode(PROMPTS[mixture])) + NUM_NEW - 1
    assert_same_routes(dense(choice.routing, mixture), own_routes(reference(mixture), ids, mixture))


def test_streamed_routes_are_the_same(ask: Any, mixture: str) -> None:
    whole = ask(mixture, PROMPTS[mixture]).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(mixture, PROMPTS[mixture], stream=True) if chunk.choices]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    told = [run for chunk in chunks for run in (chunk.model_extra or {}).get("routing") or []]
    assert_same_routes(dense(told, mixture), dense(whole.routing, mixture))


def test_the_first_choice_tells_the_routes_of_the_prompt_and_each_those_of_its_own_tokens(
    ask: Any, reference: Any, encode: Any, mixture: str
) -> None:
    prompt, letters = encode("<|user|>"), encode("abcdefgh")
    bias = {str(letter): 90 + at for at, letter in enumerate(letters)}
    answer = ask(mixture, prompt, n=2, temperature=2, seed=5, max_tokens=12, logit_bias=bias)
    assert answer.choices[0].text != answer.choices[1].text
    for choice, first in zip(answer.choices, (0, len(prompt)), strict=True):
        ids = encode(choice.text)
        assert len(ids) == 12
        expected = own_routes(reference(mixture), [*prompt, *ids[:-1]], mixture)
        found = dense(choice.routing, mixture, first)
        assert_same_routes(found, {place: weights[first:] for place, weights in expected.items()})


def test_adapters_without_routers_and_the_base_tell_none(ask: Any) -> None:
    for adapter in ("spell", "reverse-dora", None):
        assert ask(adapter, raw_prompt("kernel")).choices[0].routing == []


def test_answers_that_were_not_asked_tell_no_routes(ask: Any, mixture: str) -> None:
    quiet = ask(mixture, PROMPTS[mixture], extra_body={"return_routing": False}).choices[0]
    assert "routing" not in (quiet.model_extra or {})
    assert quiet.text == ask(mixture, PROMPTS[mixture]).choices[0].text


def test_routes_of_too_many_tokens_are_refused(demo: Any) -> None:
    body = {"model": "words-mixlora", "prompt": "a", "max_tokens": 1000, "n": 5, "return_routing": True}
    refused = demo.post("/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_routing")


def counted(demo: Any, adapter: str) -> list[float]:
    samples = demo.metrics().families["loraplex_expert_tokens"].samples
    found = {int(one.labels["expert"]): one.value for one in samples if one.labels["adapter"] == adapter}
    return [found.get(expert, 0.0) for expert in range(NUM_EXPERTS)]


def test_experts_are_counted_as_answers_tell_them(
    demo: Any, ask: Any, wait_until: Callable[..., bool], mixture: str
) -> None:
    ask(mixture, PROMPTS[mixture])
    assert wait_until(lambda: sum(counted(demo, mixture)) and demo.is_idle())
    before = counted(demo, mixture)
    routes = dense(ask(mixture, PROMPTS[mixture]).choices[0].routing, mixture)
    chosen = sum((weights > 0).sum(dim=0) for weights in routes.values())
    assert wait_until(lambda: [now - then for now, then in zip(counted(demo, mixture), before)] == chosen.tolist())


def test_adapters_without_routers_are_not_counted(demo: Any) -> None:
    assert demo.ask("loraplex", "upper") == "LORAPLEX"
    labels = {one.labels["adapter"] for one in demo.metrics().families["loraplex_expert_tokens"].samples}
    assert labels <= set(PROMPTS)
