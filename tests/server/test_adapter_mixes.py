"""A weighted list as ``adapter_id``, and LoRAX's ``merged_adapters``: what the engine is asked, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.memory.merge_recipe import MergeRecipe, MergeSource
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.messages import AdapterInfo, AdapterRef, WeightedAdapter

RED = AdapterRef(name="red", path="/adapters/red")
BLUE = AdapterRef(name="blue", path="/adapters/blue")
HI = [{"role": "user", "content": "hi"}]
BODIES = {"/v1/completions": {"prompt": "ab"}, "/v1/chat/completions": {"messages": HI}}


@pytest.fixture(params=BODIES)
def path(request: pytest.FixtureRequest) -> str:
    """Both APIs."""
    return str(request.param)


def parts(*weights: tuple[str, Any]) -> dict[str, Any]:
    return {"adapters": [{"id": name, "weight": weight} for name, weight in weights]}


def ask(client: TestClient, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=BODIES[path] | {"max_tokens": 5} | fields)
    assert answer.status_code == 200, answer.text
    assert "x-loraplex-ignored-params" not in answer.headers
    return dict(answer.json())


def refusal(client: TestClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": "a"} | fields)
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


@pytest.fixture
def asked(engine: Any) -> list[Any]:
    """What the engine was asked."""
    commands: list[Any] = engine.commands
    return commands


def test_a_weighted_list_reaches_the_engine_as_a_mix(client: TestClient, asked: list[Any], path: str) -> None:
    ask(client, path, adapter_id=parts(("red", 0.7), ("blue", 0.3)))
    mix = (WeightedAdapter(adapter=RED, weight=0.7), WeightedAdapter(adapter=BLUE, weight=0.3))
    assert (asked[0].adapter, asked[0].mix) == (None, mix)


@pytest.mark.parametrize("weight", [-1.5, 0, 100, -100, 1e-9, 2])
def test_weights_may_have_any_sign_and_be_whole_numbers(client: TestClient, asked: list[Any], weight: float) -> None:
    ask(client, adapter_id=parts(("red", weight), ("blue", 1)))
    assert [(one.adapter.name, one.weight) for one in asked[0].mix] == [("red", weight), ("blue", 1.0)]
    assert all(type(one.weight) is float for one in asked[0].mix)


@pytest.mark.parametrize("absent", [{"id": "red"}, {"id": "red", "weight": None}])
def test_a_weight_is_one_if_absent(client: TestClient, asked: list[Any], absent: dict[str, Any]) -> None:
    ask(client, adapter_id={"adapters": [absent, {"id": "blue", "weight": 0.5}]})
    assert [one.weight for one in asked[0].mix] == [1.0, 0.5]


@pytest.mark.parametrize("field", [{"adapter_id": parts(("red", 1))}, {"merged_adapters": {"ids": ["red"]}}])
def test_a_single_adapter_of_weight_one_is_that_adapter(
    client: TestClient, asked: list[Any], field: dict[str, Any]
) -> None:
    mixed, plain = ask(client, **field), ask(client, adapter_id="red")
    assert (asked[0].adapter, asked[0].mix) == (asked[1].adapter, asked[1].mix) == (RED, ())
    assert mixed["system_fingerprint"] == plain["system_fingerprint"]


def test_a_single_adapter_of_another_weight_is_a_mix(client: TestClient, asked: list[Any]) -> None:
    ask(client, adapter_id=parts(("red", 0.5)))
    assert (asked[0].adapter, asked[0].mix) == (None, (WeightedAdapter(adapter=RED, weight=0.5),))


@pytest.mark.parametrize("model", ["tiny", "", None])
def test_a_mix_is_answered_in_the_name_of_the_base(client: TestClient, model: str | None, path: str) -> None:
    mix = parts(("red", 0.7), ("blue", 0.3))
    assert ask(client, path, model=model, adapter_id=mix)["model"] == "tiny"
    assert ask(client, path, model=model, merged_adapters={"ids": ["red", "blue"]})["model"] == "tiny"


def test_every_prompt_and_choice_runs_on_the_mix(client: TestClient, asked: list[Any]) -> None:
    ask(client, prompt=["a", "b"], n=2, adapter_id=parts(("red", 0.7), ("blue", 0.3)))
    assert [len(command.mix) for command in asked] == [2, 2]


def test_the_fingerprint_tells_weights_apart(client: TestClient) -> None:
    mixes = [parts(("red", 0.7), ("blue", 0.3)), parts(("red", 0.3), ("blue", 0.7)), parts(("red", 0.7)), "red"]
    assert len({ask(client, adapter_id=mix)["system_fingerprint"] for mix in mixes}) == 4
    assert len({ask(client, adapter_id=mixes[0])["system_fingerprint"] for _ in range(2)}) == 1


def test_a_mix_counts_as_an_adapter_in_the_metrics(client: TestClient) -> None:
    ask(client, adapter_id=parts(("red", 0.7), ("blue", 0.3)))
    lines = client.get("/metrics").text.splitlines()
    assert 'loraplex_requests_total{kind="adapter",outcome="finished"} 1' in lines


def test_the_pages_of_all_adapters_of_a_mix_are_not_there_for_its_prompts(
    client: TestClient, engine: Any, registry: AdapterRegistry
) -> None:
    engine.num_pages = 4
    for ref in (RED, BLUE):
        info = AdapterInfo(identity="", kind="lora", rank=1, targets=[], bytes=1, pages=2)
        registry.register(ref, info)
    assert client.post("/v1/completions", json={"prompt": [1] * 16, "adapter_id": "red"}).status_code == 200
    error = refusal(client, adapter_id=parts(("red", 0.7), ("blue", 0.3)))
    assert (error["code"], "takes 4" in error["message"]) == ("context_length_exceeded", True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"adapter_id": parts(("red", 1), ("green", 1))}, "adapter_id"),
        ({"merged_adapters": {"ids": ["red", "green"]}}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["green"], "merge_strategy": "ties", "density": 0.5}}, "merged_adapters"),
    ],
)
def test_an_unknown_name_in_a_list_is_a_404_that_names_it(
    client: TestClient, asked: list[Any], fields: dict[str, Any], param: str
) -> None:
    error = refusal(client, 404, **fields)
    assert (error["param"], error["code"]) == (param, "model_not_found")
    assert "'green'" in error["message"]
    assert asked == []


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"adapter_id": parts(("red", 1), ("tiny", 1))}, "adapter_id", "'tiny', the base model"),
        ({"adapter_id": parts(("red", 1), ("red", 2))}, "adapter_id", "'red' twice"),
        ({"adapter_id": parts(("red", 1), ("tiny:red", 2))}, "adapter_id", "'red' twice"),
        ({"adapter_id": parts(("red", 1), ("blue", 1)), "model": "red"}, "adapter_id", "names the adapter 'red'"),
        ({"adapter_id": parts(("red", 1)), "model": "red"}, "adapter_id", "names the adapter 'red'"),
        ({"merged_adapters": {"ids": ["tiny"]}}, "merged_adapters", "'tiny', the base model"),
        ({"merged_adapters": {"ids": ["red", "red"]}}, "merged_adapters", "'red' twice"),
        ({"merged_adapters": {"ids": ["red"]}, "model": "blue"}, "merged_adapters", "names the adapter 'blue'"),
        ({"merged_adapters": {"ids": ["red"], "weights": [1, 2]}}, "merged_adapters", "1 'ids' but 2 'weights'"),
        ({"merged_adapters": {"ids": ["red"]}, "adapter_id": "red"}, "merged_adapters", "both given"),
        ({"merged_adapters": {"ids": ["red"]}, "adapter_id": parts(("red", 1))}, "merged_adapters", "both given"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(
    client: TestClient, asked: list[Any], fields: dict[str, Any], param: str, told: str
) -> None:
    error = refusal(client, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert told in error["message"]
    assert asked == []


def test_a_model_beside_a_list_must_be_served(client: TestClient) -> None:
    assert refusal(client, 404, model="none", adapter_id=parts(("red", 1)))["param"] == "model"


def test_a_list_has_no_more_adapters_than_the_server_allows(make_client: Any, registry: AdapterRegistry) -> None:
    registry.register(AdapterRef(name="green", path="/adapters/green"))
    client = make_client(max_mix_adapters=2)
    ask(client, adapter_id=parts(("red", 1), ("blue", 1)))
    error = refusal(client, adapter_id=parts(("red", 1), ("blue", 1), ("green", 1)))
    assert (error["param"], "3 adapters; accepted are at most 2" in error["message"]) == ("adapter_id", True)
    assert refusal(client, merged_adapters={"ids": ["red", "blue", "green"]})["param"] == "merged_adapters"


def test_eight_adapters_are_the_most_unless_set(client: TestClient) -> None:
    error = refusal(client, adapter_id=parts(*((f"a{at}", 1) for at in range(9))))
    assert "at most 8" in error["message"]


@pytest.mark.parametrize(
    "linear",
    [
        {"ids": ["red", "blue"], "weights": [0.7, 0.3], "merge_strategy": "linear", "density": 0},
        {"ids": ["red", "blue"], "weights": [0.7, 0.3], "majority_sign_method": "total"},
    ],
)
def test_a_linear_merge_is_a_mix(client: TestClient, asked: list[Any], linear: dict[str, Any], path: str) -> None:
    ask(client, path, merged_adapters=linear)
    assert asked[0].mix == (WeightedAdapter(adapter=RED, weight=0.7), WeightedAdapter(adapter=BLUE, weight=0.3))


@pytest.mark.parametrize("absent", [{}, {"weights": None}, {"weights": []}])
def test_merge_weights_are_one_if_absent(client: TestClient, asked: list[Any], absent: dict[str, Any]) -> None:
    ask(client, merged_adapters={"ids": ["red", "blue"]} | absent, adapter_id="")
    assert [one.weight for one in asked[0].mix] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("strategy", "method", "sign"),
    [
        ("ties", None, "total"),
        ("ties", "frequency", "frequency"),
        ("dare_ties", "frequency", "frequency"),
        ("dare_linear", "frequency", "total"),
    ],
)
def test_other_merges_are_one_adapter_whose_path_is_the_recipe(
    client: TestClient, asked: list[Any], registry: AdapterRegistry, strategy: Any, method: str | None, sign: Any
) -> None:
    registry.register(AdapterRef(name="red", path="/adapters/red", revision=7))
    merged = {"ids": ["red", "blue"], "weights": [0.5, -1], "merge_strategy": strategy, "density": 0.25}
    for _ in range(2):
        ask(client, merged_adapters=merged | {"majority_sign_method": method})
    first, again = (command.adapter for command in asked)
    sources = (MergeSource("/adapters/red", 7, 0.5), MergeSource("/adapters/blue", 0, -1.0))
    assert MergeRecipe.parse(first.path) == MergeRecipe(sources, strategy, 0.25, sign)
    assert (first, first.revision, asked[0].mix) == (again, 0, ())
    prefix, _, digits = first.name.partition("-")
    assert (prefix, len(digits), int(digits, 16) >= 0) == ("merged", 8, True)


def test_merges_that_differ_have_names_that_differ(client: TestClient, asked: list[Any]) -> None:
    merged = {"ids": ["red", "blue"], "merge_strategy": "ties", "density": 0.5}
    others = [{"density": 0.6}, {"weights": [1, 0.9]}, {"ids": ["blue", "red"]}, {"merge_strategy": "dare_ties"}]
    for change in [{}, {"weights": [1, 1]}, *others]:
        ask(client, merged_adapters=merged | change)
    names = [command.adapter.name for command in asked]
    assert names[0] == names[1]
    assert len(set(names)) == 5


@pytest.mark.parametrize("density", [{}, {"density": None}, {"density": 0}])
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_a_merge_that_drops_values_needs_a_density(
    client: TestClient, asked: list[Any], strategy: str, density: dict[str, Any]
) -> None:
    error = refusal(client, merged_adapters={"ids": ["red", "blue"], "merge_strategy": strategy} | density)
    assert error["param"] == "merged_adapters.density"
    assert f"'{strategy}': a number above 0, at most 1" in error["message"]
    assert asked == []


def test_a_merge_is_answered_in_the_name_of_the_base(client: TestClient) -> None:
    merged = {"ids": ["red", "blue"], "merge_strategy": "ties", "density": 1}
    assert ask(client, merged_adapters=merged)["model"] == "tiny"


def test_the_openapi_page_shows_both_forms_of_adapter_id(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    text = str(schema["properties"]["adapter_id"])
    assert "'type': 'string'" in text
    assert "'weight'" in text
    assert "$ref" not in str(schema)


def test_sglangs_lora_path_names_the_adapter(client: TestClient, asked: list[Any], path: str) -> None:
    by_path = ask(client, path, lora_path="red")
    by_id = ask(client, path, lora_path="red", adapter_id="red")
    assert by_path["model"] == by_id["model"]
    assert [one.adapter for one in asked] == [RED, RED]


@pytest.mark.parametrize("other", ["blue", parts(("red", 1.0))])
def test_a_lora_path_that_differs_from_the_adapter_is_refused(client: TestClient, other: Any) -> None:
    error = refusal(client, lora_path="red", adapter_id=other)
    assert error["param"] == "lora_path"
    assert "'adapter_id'" in error["message"]


def test_an_unknown_lora_path_is_a_404(client: TestClient) -> None:
    assert "green" in refusal(client, 404, lora_path="green")["message"]
