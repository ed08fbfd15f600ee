"""What a base model says under adapters, computed as plainly as it can be: the reference of the tests.

A transformers model in float64, whose linears and feed-forward networks are replaced, one token and one expert after
another, by products with dense matrices ``W + s B A``. Adapter folders are read by their keys, with nothing of the
package under test.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.activations import ACT2FN

LAYER = r"(?P<kind>\w+)\.layers\.(?P<layer>\d+)"
HALF = r"\.(?P<half>lora_A|lora_B|lora_magnitude_vector)"
KEYS = [
    rf"{LAYER}\.(?:mlp\.moe_)?(?P<router>gate)",
    rf"{LAYER}\.(?:self_attn|mlp)\.(?P<site>\w+)\.(?P<router>moe_gate)",
    r"tokenwise\.(?P<router>router)",
    rf"{LAYER}\.(?:self_attn|mlp)\.(?P<site>\w+)\.experts\.(?P<expert>\d+){HALF}",
    rf"{LAYER}\.(?:mlp\.)?experts\.(?P<expert>\d+)\.(?P<site>\w+){HALF}",
    rf"{LAYER}\.(?:self_attn|mlp)\.(?P<site>\w+){HALF}",
    rf"base_model\.model\.{LAYER}\.(?:self_attn|mlp)\.(?P<site>\w+){HALF}",
    rf"base_model\.model\.(?P<site>lm_head){HALF}",
    r"base_model\.model\.model\.(?P<site>embed_tokens)\.(?P<half>lora_embedding_[AB]|lora_magnitude_vector)",
]
HALVES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}
OLDEST_NAMES = {"w1_proj": "gate_proj", "w3_proj": "up_proj", "w2_proj": "down_proj"}

Place = tuple[int | None, str | None]
"""Layer and site; the site of a router of feed-forward networks is None, as are both of a token-wise one."""


@dataclass
class Pair:
    """``W`` becomes ``W + scale * b @ a``, with its rows brought to the length ``magnitude`` if there is one."""

    scale: float
    a: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    b: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: torch.Tensor | None = None

    def adapted(self, weight: torch.Tensor) -> torch.Tensor:
        dense = weight + self.scale * self.b @ self.a
        return dense if self.magnitude is None else dense * (self.magnitude / dense.norm(dim=1))[:, None]


@dataclass
class Adapter:
    """A folder as read: ordinary pairs, pairs of experts, and routers [experts, in]."""

    config: dict[str, Any]
    pairs: dict[Place, Pair] = field(default_factory=dict)
    experts: dict[tuple[int | None, str, int], Pair] = field(default_factory=dict)
    routers: dict[Place, torch.Tensor] = field(default_factory=dict)

    def scale(self, *, of_expert: bool) -> float:
        config = self.config | (self.config.get("expert_lora", {}) if of_expert else {})
        return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def read_folder(folder: Path | str) -> Adapter:
    """KeyError for a key that is no adapter's."""
    adapter = Adapter(json.loads((Path(folder) / "adapter_config.json").read_text()))
    for key, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        match = next(filter(None, (re.fullmatch(rule, key.removesuffix(".weight")) for rule in KEYS)), None)
        if match is None:
            raise KeyError(key)
        _keep(adapter, match.groupdict(), tensor.double())
    return adapter


def _keep(adapter: Adapter, found: dict[str, str], tensor: torch.Tensor) -> None:
    layer = int(found["layer"]) if found.get("layer") else None
    site = OLDEST_NAMES.get(found.get("site", ""), found.get("site"))
    if found.get("router"):
        adapter.routers[layer, site] = tensor
        return
    if found.get("expert") is not None:
        place = (layer, site, int(found["expert"]))
        pair = adapter.experts.setdefault(place, Pair(adapter.scale(of_expert=True)))
    else:
        pair = adapter.pairs.setdefault((layer, site), Pair(adapter.scale(of_expert=False)))
    setattr(pair, HALVES[found["half"]], tensor)


def choose(logits: torch.Tensor, config: dict[str, Any]) -> tuple[list[tuple[int, float]], float]:
    """The experts that one token takes, best first, with their weights; and by how little it took no others."""
    p = logits.softmax(dim=0).tolist()
    order = sorted(range(len(p)), key=lambda expert: (-p[expert], expert))
    strategy = config.get("routing_strategy", "")
    margin = 1.0
    if "LORAMOE" in (config.get("peft_type"), strategy.upper()):
        route = [(expert, p[expert]) for expert in order]
    elif "dynamic" in strategy:
        route, margin = _shortest_prefix(p, order, config)
    elif strategy.removeprefix("mixlora-") == "switch":
        route = [(order[0], p[order[0]])]
    else:
        chosen = order[: config.get("top_k", 2)]
        route = [(expert, p[expert] / sum(p[e] for e in chosen)) for expert in chosen]
    (last, weight), rest = route[-1], order[len(route) :]
    if rest and weight > 1e-6:  # the last of those taken might as well be the first of the others
        margin = min(margin, float(logits[last] - logits[rest[0]]))
    return route, margin


def _shortest_prefix(p: list[float], order: list[int], config: dict[str, Any]) -> tuple[list[tuple[int, float]], float]:
    top_p, temperature = config.get("top_p", 0.8), config.get("temperature", 0.0)
    weights = [p[expert] / temperature if temperature > 0 else p[expert] for expert in order]
    sums = [sum(weights[: n + 1]) for n in range(len(order))]
    count = next((n for n, total in enumerate(sums, start=1) if total > top_p), len(order))
    return list(zip(order[:count], weights)), min(abs(total - top_p) for total in sums[:count])


@dataclass
class Answer:
    """What the model said.

    Attributes:
        logprobs: [tokens, vocabulary] float64.
        routes: of every router, for each token, the experts and their weights.
        margin: the smallest by which any router decided; below the rounding of float32 a comparison means nothing.
    """

    logprobs: torch.Tensor
    routes: dict[Place, list[list[tuple[int, float]]]]
    margin: float

    @property
    def tokens_differ_in_their_routes(self) -> bool:
        """Under most routers at least two tokens differ in their experts or in their weights."""
        differ = [any(route != routes[0] for route in routes) for routes in self.routes.values()]
        return 2 * sum(differ) > len(differ)


class PlainModel:
    """A transformers model under a weighted mix of adapters; one adapter is a mix with weight 1."""

    def __init__(self, model: Any, mix: Iterable[tuple[Adapter, float]] = ()) -> None:
        self._model = copy.deepcopy(model).double()
        self._mix = list(mix)
        self._routes: dict[Place, list[list[tuple[int, float]]]] = {}
        self._margin = 1.0
        self._token_routes: dict[int, list[list[tuple[int, float]]]] = {}
        self._replace_forwards()

    def answer(self, tokens: Sequence[int]) -> Answer:
        self._routes, self._margin = {}, 1.0
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return Answer(logits.log_softmax(dim=-1), self._routes, self._margin)

    def _replace_forwards(self) -> None:
        inner = self._model.model
        inner.layers[0].input_layernorm.register_forward_hook(lambda _module, _args, out: self._route_tokens(out[0]))
        self._replace_embedding(inner.embed_tokens)
        self._replace(self._model.lm_head, None, "lm_head")
        for index, layer in enumerate(inner.layers):
            for parent in (layer.self_attn, layer.mlp):
                for site, module in parent.named_children():
                    if isinstance(module, torch.nn.Linear):
                        self._replace(module, index, site)
            self._replace_ffn(layer.mlp, index)

    def _replace(self, linear: torch.nn.Linear, layer: int | None, site: str) -> None:
        """``y = W x + sum of weight * (the adapter's output - W x)``."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            base = torch.nn.functional.linear(x[0], linear.weight, linear.bias)
            y = base
            for i, (adapter, weight) in enumerate(self._mix):
                y = y + weight * (self._linear(adapter, i, linear, (layer, site), x[0]) - base)
            return y[None]

        linear.forward = forward

    def _replace_embedding(self, embedding: torch.nn.Embedding) -> None:
        def forward(tokens: torch.Tensor) -> torch.Tensor:
            rows = embedding.weight
            for adapter, weight in self._mix:
                if (None, "embed_tokens") in adapter.pairs:
                    adapted = adapter.pairs[None, "embed_tokens"].adapted(embedding.weight.T).T
                    rows = rows + weight * (adapted - embedding.weight)
            return rows[tokens]

        embedding.forward = forward

    def _linear(self, adapter: Adapter, i: int, linear: Any, place: Place, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out] under one adapter."""
        if place in adapter.pairs:
            return torch.nn.functional.linear(x, adapter.pairs[place].adapted(linear.weight), linear.bias)
        y = torch.nn.functional.linear(x, linear.weight, linear.bias)
        if place in adapter.routers:
            routes = self._route(adapter, place, x)
        elif i in self._token_routes and (*place, 0) in adapter.experts:
            routes = self._token_routes[i]
        else:
            return y
        for token, route in enumerate(routes):
            for expert, weight in route:
                pair = adapter.experts[(*place, expert)]
                y[token] += weight * pair.scale * (pair.b @ (pair.a @ x[token]))
        return y

    def _replace_ffn(self, mlp: Any, layer: int) -> None:
        mixtures = [adapter for adapter, _ in self._mix if (layer, None) in adapter.routers]
        if mixtures:
            (adapter,) = mixtures
            assert len(self._mix) == 1, "feed-forward networks of several adapters do not add up"
            mlp.forward = partial(self._mixture, adapter, mlp, layer)

    def _mixture(self, adapter: Adapter, mlp: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Every expert is a whole feed-forward network: ``down_e(act(gate_e(x)) * up_e(x))``."""
        act = ACT2FN[adapter.config.get("act_fn") or mlp.config.hidden_act]
        y = torch.zeros_like(x)
        networks = [self._expert(adapter, mlp, layer, e) for e in range(len(adapter.routers[layer, None]))]
        for token, route in enumerate(self._route(adapter, (layer, None), x[0])):
            for expert, weight in route:
                gate, up, down = networks[expert]
                y[0, token] += weight * down(act(gate(x[0, token])) * up(x[0, token]))
        return y

    def _expert(self, adapter: Adapter, mlp: Any, layer: int, expert: int) -> list[Callable[..., torch.Tensor]]:
        networks = []
        for site in ("gate_proj", "up_proj", "down_proj"):
            linear, pair = getattr(mlp, site), adapter.experts.get((layer, site, expert))
            weight = linear.weight if pair is None else pair.adapted(linear.weight)
            networks.append(partial(torch.nn.functional.linear, weight=weight, bias=linear.bias))
        return networks

    def _route(self, adapter: Adapter, place: Place, x: torch.Tensor) -> list[list[tuple[int, float]]]:
        routes = []
        for token in x:
            route, margin = choose(adapter.routers[place] @ token, adapter.config)
            routes.append(route)
            self._margin = min(self._margin, margin)
        self._routes[place] = routes
        return routes

    def _route_tokens(self, x: torch.Tensor) -> None:
        """Token-wise routing: once for all layers, by what the first layer's attention reads."""
        for i, (adapter, _) in enumerate(self._mix):
            if (None, None) in adapter.routers:
                self._token_routes[i] = self._route(adapter, (None, None), x)


def plain_answer(model: Any, mix: Iterable[tuple[Path | str, float]], tokens: Sequence[int]) -> Answer:
    """Of a transformers model, under folders with their weights, for one sequence."""
    return PlainModel(model, [(read_folder(folder), weight) for folder, weight in mix]).answer(tokens)
