"""Several adapters in one request: weighted mixes, and merges as LoRAX's clients ask for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file

from loraplex.server.demo.assets import adapters_folder
from loraplex.server.demo.kinds import kind_named
from loraplex.server.demo.scoring import raw_prompt
from loraplex.server.demo.tasks import task_named

PROMPT = raw_prompt("kernel") + "k-e-r-n"
MERGES = ("ties", "dare_linear", "dare_ties")
LOADS = "loraplex_adapter_loads_total"


@pytest.fixture(autouse=True)
def goes_on_serving(demo: Any) -> Any:
    yield
    task = task_named("echo")
    messages = kind_named("words-mixlora").messages(task, task.sample)
    assert demo.ask("", "words-mixlora", messages=messages) == task.answer(task.sample)


def pool_hits(metrics: Any) -> float:
    return float(metrics.value("loraplex_adapter_lookups_total", tier="pool", result="hit"))


@pytest.fixture
def ids(encode: Any) -> list[int]:
    return list(encode(PROMPT))


def mix(**weights: float) -> dict[str, Any]:
    """``adapter_id`` as a list; underscores stand for hyphens."""
    return {"adapters": [{"id": name.replace("_", "-"), "weight": weight} for name, weight in weights.items()]}


def merge(*ids: str, strategy: str, **options: Any) -> dict[str, Any]:
    return {"merged_adapters": {"ids": list(ids), "merge_strategy": strategy, "density": 0.5, **options}}


def add_to(model: Any, name: str, weight: float) -> None:
    """Add ``weight`` times what an adapter of the demo changes to the weights of a bare model; DoRA's norms are those
    of the bare model, so that one comes first."""
    folder = adapters_folder() / name
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        base = model.get_submodule(stem.removeprefix("base_model.model.")).weight.data
        a, b = tensors[key].float(), tensors[f"{stem}.lora_B.weight"].float()
        adapted = base + config["lora_alpha"] / len(a) * b @ a
        magnitudes = tensors.get(f"{stem}.lora_magnitude_vector")
        if magnitudes is not None:
            adapted *= (magnitudes.float() / adapted.norm(dim=1))[:, None]
        base += weight * (adapted - base)


@pytest.mark.parametrize(
    "weights",
    [{"caesar": 0.7, "count": 0.3}, {"reverse-dora": 0.4, "spell": 0.6}, {"upper": 2.0, "sort": -0.5, "devowel": 0.1}],
    ids="+".join,
)
def test_a_mix_is_the_weighted_sum_of_what_its_adapters_change(
    served_top: Any, top_of: Any, bare_model: Any, assert_near: Any, ids: list[int], weights: dict[str, float]
) -> None:
    model = bare_model()
    for name, weight in weights.items():
        add_to(model, name, weight)
    listed = {"adapters": [{"id": name, "weight": weight} for name, weight in weights.items()]}
    assert_near(served_top(ids, adapter_id=listed), top_of(model, ids)[:-1])


@pytest.mark.parametrize("name", ["spell", "reverse-dora", "words-tokenwise"])
def test_a_mix_that_leaves_one_adapter_is_that_adapter(
    served_top: Any, assert_near: Any, ids: list[int], name: str
) -> None:
    alone = served_top(ids, adapter_id=name)
    assert (alone - served_top(ids)).abs().max() > 0.1
    for listed in ({name: 1.0}, {name: 1.0, "upper": 0.0}):
        parts = [{"id": one, "weight": weight} for one, weight in listed.items()]
        assert_near(served_top(ids, adapter_id={"adapters": parts}), alone, 1e-4)


def test_a_mix_may_be_of_any_weight_with_the_base_left_as_it_is(
    served_top: Any, assert_near: Any, ids: list[int]
) -> None:
    assert_near(served_top(ids, adapter_id=mix(spell=0.0, upper=0.0)), served_top(ids), 1e-4)


def test_lorax_linear_is_a_mix_and_absent_weights_are_one(served_top: Any, assert_near: Any, ids: list[int]) -> None:
    merged = {"ids": ["caesar", "devowel"], "weights": [0.75, 0.25], "merge_strategy": "linear"}
    listed = mix(caesar=0.75, devowel=0.25)
    assert_near(served_top(ids, merged_adapters=merged), served_top(ids, adapter_id=listed), 1e-4)
    plain = {"ids": ["caesar", "devowel"]}
    assert_near(served_top(ids, merged_adapters=plain), served_top(ids, adapter_id=mix(caesar=1, devowel=1)), 1e-4)


@pytest.mark.parametrize("strategy", MERGES)
def test_a_merge_is_built_once_and_stays_the_same(
    demo: Any, served_top: Any, wait_until: Callable[..., bool], ids: list[int], strategy: str
) -> None:
    mixed = served_top(ids, adapter_id=mix(caesar=1, devowel=1))  # a model's kind is listed once it was read
    before = demo.metrics()
    listed = demo.get("/v1/models").json()
    first = served_top(ids, **merge("caesar", "devowel", strategy=strategy))
    assert wait_until(lambda: demo.metrics().value(LOADS) > before.value(LOADS))
    middle = demo.metrics()
    assert torch.equal(served_top(ids, **merge("caesar", "devowel", strategy=strategy)), first)
    assert wait_until(lambda: pool_hits(demo.metrics()) > pool_hits(middle))
    assert demo.metrics().value(LOADS) == middle.value(LOADS)
    assert (mixed - first).abs().max() > 1e-3
    assert demo.get("/v1/models").json() == listed


def refused(client: Any, **body: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="loraplex-demo", prompt="a", extra_body=body)
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"adapter_id": mix(spell=0.5, words_mixlora=0.5)}, "adapter_id", "words-mixlora"),
        ({"adapter_id": {"adapters": [{"id": "spell", "weight": 0.5}] * 2}}, "adapter_id", "'spell' twice"),
        ({"adapter_id": {"adapters": []}}, "adapter_id.adapters", ""),
        ({"adapter_id": {"adapters": [{"id": "spell", "wieght": 2}]}}, "adapter_id.adapters[0].wieght", ""),
        ({"adapter_id": mix(spell=1e9)}, "adapter_id.adapters[0].weight", "100"),
        ({"adapter_id": {"adapters": [{"id": "loraplex-demo"}]}}, "adapter_id", "base model"),
        ({"adapter_id": "spell", **merge("upper", "count", strategy="linear")}, "merged_adapters", "adapter_id"),
        (merge("caesar", "devowel", strategy="ties", density=None), "merged_adapters.density", "ties"),
        (merge("caesar", "devowel", strategy="ties", weights=[1.0]), "merged_adapters", "weights"),
        (merge("caesar", "devowel", strategy="svd"), "merged_adapters.merge_strategy", "dare_ties"),
    ],
)
def test_lists_that_break_a_rule_are_refused(client: Any, body: dict[str, Any], param: str, named: str) -> None:
    error = refused(client, **body)
    assert error.param == param
    assert named in error.message


@pytest.mark.parametrize(("second", "named"), [("words-mixlora", "mixlora cannot be merged"), ("upper", "rank 2")])
def test_what_cannot_be_merged_is_refused_by_its_place_in_the_list(client: Any, second: str, named: str) -> None:
    error = refused(client, **merge("spell", second, strategy="ties"))
    assert error.param == "merged_adapters"
    assert f"adapter 2 of the merge: {named}" in error.message
    assert str(adapters_folder()) not in error.message


def test_unknown_names_in_a_list_are_not_found(client: Any) -> None:
    for body in ({"adapter_id": mix(spell=1, nobody=1)}, merge("spell", "nobody", strategy="linear")):
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.completions.create(model="loraplex-demo", prompt="a", extra_body=body)
