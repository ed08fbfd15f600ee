"""``return_routing``: what routers chose, in whole answers and in streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from loraplex.server.messages import RouterChoice
from loraplex.server.routing_runs import routing_runs

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "abc"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
}
NUM_PROMPT = {COMPLETIONS: 3, CHAT: 21}


@pytest.fixture(params=BODIES)
def path(request: pytest.FixtureRequest) -> str:
    """Both APIs."""
    return str(request.param)


def body(path: str, **fields: Any) -> dict[str, Any]:
    return BODIES[path] | {"max_tokens": 5, "adapter_id": "red", "return_routing": True} | fields


def choices(client: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json=body(path, **fields))
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def chunks(client: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json=body(path, stream=True, **fields))
    assert answer.status_code == 200, answer.text
    events = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-2]]
    return [choice for event in events for choice in event["choices"]]


def run_of(layer: int, start: int, end: int) -> dict[str, Any]:
    """What the engine of these tests says of the tokens from start to end."""
    return {
        "adapter": "red",
        "layer": layer,
        "site": "mlp",
        "start": start,
        "experts": [[at % 8, layer] for at in range(start, end)],
        "weights": [[float(at), 0.5] for at in range(start, end)],
    }


def test_an_answer_tells_the_routes_of_all_tokens_that_were_computed(
    client: TestClient, engine: Any, path: str
) -> None:
    engine.script.routed_layers = 2
    [choice] = choices(client, path)
    end = NUM_PROMPT[path] + 4
    assert choice["routing"] == [run_of(0, 0, end), run_of(1, 0, end)]
    assert engine.commands[0].return_routing


def test_routes_of_the_prompt_come_with_the_first_choice_alone(client: TestClient, engine: Any, path: str) -> None:
    engine.script.routed_layers = 1
    first, second = choices(client, path, n=2)
    start = NUM_PROMPT[path]
    assert first["routing"] == [run_of(0, 0, start + 4)]
    assert second["routing"] == [run_of(0, start, start + 4)]


def test_each_prompt_has_its_own_routes(client: TestClient, engine: Any) -> None:
    engine.script.routed_layers = 1
    routes = [choice["routing"] for choice in choices(client, COMPLETIONS, prompt=["a", "bcd"], max_tokens=2)]
    assert routes == [[run_of(0, 0, 2)], [run_of(0, 0, 4)]]


def test_an_answer_without_routers_has_an_empty_list(client: TestClient, path: str) -> None:
    assert [choice["routing"] for choice in choices(client, path, n=2, adapter_id=None)] == [[], []]
    assert not any("routing" in chunk for chunk in chunks(client, path))


@pytest.mark.parametrize("absent", [None, False])
def test_routes_are_told_only_where_they_are_asked_for(client: TestClient, engine: Any, path: str, absent: Any) -> None:
    engine.script.routed_layers = 1
    assert not any("routing" in choice for choice in choices(client, path, return_routing=absent))
    assert not any("routing" in choice for choice in chunks(client, path, return_routing=absent))
    assert not any(command.return_routing for command in engine.commands)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("eos_after", [None, 0, 3])
def test_streamed_routes_are_those_of_the_whole_answer(
    make_client: Any, engine: Any, path: str, interval: int, chunk: int, eos_after: int | None
) -> None:
    engine.script.routed_layers, engine.script.chunk, engine.script.eos_after = 2, chunk, eos_after
    client = make_client(stream_interval=interval)
    whole = [choice["routing"] for choice in choices(client, path, n=2)]
    pieces = chunks(client, path, n=2)
    for index in range(2):
        told = [run for piece in pieces if piece["index"] == index for run in piece.get("routing", ())]
        joined = routing_runs(RouterChoice(**run) for run in told)
        assert joined == whole[index]
    assert all(piece["routing"] for piece in pieces if "routing" in piece)


def test_each_chunk_of_a_stream_has_the_routes_of_its_tokens(client: TestClient, engine: Any) -> None:
    engine.script.routed_layers = 1
    pieces = chunks(client, CHAT, max_tokens=3)
    told = [[(run["start"], len(run["experts"])) for run in piece.get("routing", ())] for piece in pieces]
    assert told == [[], [(0, 21)], [(21, 1)], [(22, 1)], []]


def test_routes_cover_what_was_computed_though_a_stop_string_cut_it_off(client: TestClient, engine: Any) -> None:
    engine.script.routed_layers = 1
    [choice] = choices(client, COMPLETIONS, stop=["lo, w"], max_tokens=40)
    assert choice["text"] == "Hel"
    assert choice["routing"] == [run_of(0, 0, 3 + 8 - 1)]


def test_a_prompt_that_is_only_scored_has_routes(client: TestClient, engine: Any) -> None:
    engine.script.routed_layers = 1
    [choice] = choices(client, COMPLETIONS, max_tokens=0, echo=True, logprobs=1)
    assert choice["routing"] == [run_of(0, 0, 3)]


@pytest.mark.parametrize(
    ("fits", "more"),
    [
        ({"max_tokens": 97}, {"max_tokens": 98}),
        ({"max_tokens": 49, "n": 2, "prompt": "ab"}, {"max_tokens": 49, "n": 2, "prompt": "abc"}),
        ({"max_tokens": 49, "prompt": ["a", "b"]}, {"max_tokens": 49, "prompt": ["a", "bc"]}),
    ],
)
def test_routes_of_too_many_tokens_are_refused_with_the_numbers(
    make_client: Any, engine: Any, fits: dict[str, Any], more: dict[str, Any]
) -> None:
    client = make_client(max_routing_tokens=100)
    choices(client, COMPLETIONS, **fits)
    engine.commands.clear()
    answer = client.post(COMPLETIONS, json=body(COMPLETIONS, **more))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "return_routing")
    assert "up to 101 tokens" in error["message"]
    assert "at most 100" in error["message"]
    assert engine.commands == []
    assert client.post(COMPLETIONS, json=body(COMPLETIONS, **more) | {"return_routing": False}).status_code == 200


def test_an_answer_of_any_length_is_too_long_for_routes_in_a_long_context(client: TestClient, engine: Any) -> None:
    engine.max_model_len = engine.num_pages = 5000
    answer = client.post(CHAT, json=body(CHAT, max_tokens=None))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "return_routing")
    assert "'max_tokens'" in answer.json()["error"]["message"]


def test_runs_of_one_router_are_joined_only_where_one_follows_the_other() -> None:
    def told(layer: int | None, start: int, *experts: int, site: str = "mlp", adapter: str = "red") -> RouterChoice:
        rows = [[expert] for expert in experts]
        weights = [[expert / 8] for expert in experts]
        return RouterChoice(adapter=adapter, layer=layer, site=site, start=start, experts=rows, weights=weights)

    joined = routing_runs(
        [
            told(0, 0, 1, 2),
            told(1, 0, 3, 4),
            told(0, 2, 5),
            told(1, 3, 6),
            told(0, 3, 7, site="q_proj"),
            told(0, 3, 0, adapter="blue"),
            told(None, 3, 1, site="token"),
            told(None, 4, 2, site="token"),
        ]
    )
    assert [(run["layer"], run["site"], run["adapter"], run["start"], run["experts"]) for run in joined] == [
        (0, "mlp", "red", 0, [[1], [2], [5]]),
        (1, "mlp", "red", 0, [[3], [4]]),
        (1, "mlp", "red", 3, [[6]]),
        (0, "q_proj", "red", 3, [[7]]),
        (0, "mlp", "blue", 3, [[0]]),
        (None, "token", "red", 3, [[1], [2]]),
    ]
    assert joined[0]["weights"] == [[1 / 8], [2 / 8], [5 / 8]]
