"""What ``adapter_config.json`` says of a mixture beyond plain LoRA: how many experts, and how they are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loraplex.memory.adapter_config import (
    CONFIG_NAME,
    LoraConfig,
    RawConfig,
    read_integer,
    read_number,
    text_or_none,
    wrong_value,
)
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import Routing, RoutingScope

MAX_EXPERTS = 256

Strategy = Literal["top-k", "dynamic", "switch", "dense"]
"""The best k, divided by their sum; the shortest prefix above top_p; the best; all. ``Routing`` has the arithmetic."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

MIXTURE_KEYS = frozenset(
    {
        "num_experts",
        "top_k",
        "top_p",
        "temperature",
        "act_fn",
        "routing_strategy",
        "expert_lora",
        "dropout",
        "entropy_eps",
        "entropy_index",
        "entropy_type",
        "expert_capacity",
        "ffn_dropout",
        "jitter_noise",
        "lora_init",
        "name",
        "router_aux_loss_coef",
        "router_dyn_loss_coef",
        "router_init_range",
        "router_loss",
        "router_z_loss_coef",
        "sparse_step",
        "task_name",
    }
)
"""Known beyond those of LoRA. From ``dropout`` on they are of no effect at inference."""


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """How a mixture is to be computed.

    Attributes:
        plain: of the pairs that every row takes.
        expert: of the experts' pairs.
        routing: how experts are chosen.
        strategy: the name of that way.
    """

    plain: LoraConfig
    expert: LoraConfig
    routing: Routing
    strategy: Strategy

    @classmethod
    def parse(
        cls,
        raw: RawConfig,
        *,
        scope: RoutingScope,
        strategies: Mapping[str, Strategy],
        strategy: Strategy | None,
        allow_dora: bool,
    ) -> MixtureConfig:
        """Check the configuration of a mixture.

        Args:
            raw: as it stands in the file.
            scope: of the family's experts.
            strategies: of the family, by the names that ``routing_strategy`` may have.
            strategy: that holds where there is no ``routing_strategy``; None if it must be there.
            allow_dora: whether the family's pairs may be decomposed.

        Errors: AdapterFileError naming the key at fault.
        """
        for key in ("r", "lora_alpha", "num_experts"):
            if raw.get(key) is None:
                raise AdapterFileError(f"{key} in {CONFIG_NAME}: missing; a mixture needs it", key=key)
        plain = LoraConfig.parse(raw, also_known=MIXTURE_KEYS)
        expert = _expert_config(raw)
        if plain.invocation or expert.invocation:
            key = "alora_invocation_tokens"
            raise AdapterFileError(f"{key} in {CONFIG_NAME}: an activated mixture is not served; only LORA is", key=key)
        if (plain.use_dora or expert.use_dora) and not allow_dora:
            raise AdapterFileError(
                f"use_dora in {CONFIG_NAME}: DoRA in this kind of mixture is not served; expected false", key="use_dora"
            )
        chosen = _strategy(raw, strategies, strategy)
        return cls(plain, expert, _routing(raw, scope, chosen), chosen)

    def check_cost(self, num_modules: int) -> None:
        """As of ``LoraConfig``."""
        self.plain.check_cost(num_modules)
        self.expert.check_cost(num_modules)

    @property
    def settings(self) -> dict[str, object]:
        """What matters at inference, ready for JSON: see ``adapter_identity``."""
        routing = self.routing
        return {
            "plain": self.plain.settings,
            "expert": self.expert.settings,
            "num_experts": routing.num_experts,
            "limit": routing.limit,
            "renormalize": routing.renormalize,
            "top_p": routing.top_p,
            "temperature": routing.temperature,
            "activation": routing.activation,
        }


def _expert_config(raw: RawConfig) -> LoraConfig:
    values = _expert_values(raw)
    try:
        return LoraConfig.parse({**raw, **values}, also_known=MIXTURE_KEYS)
    except AdapterFileError as error:
        if error.key not in values:
            raise
        raise AdapterFileError(f"expert_lora.{error.message}", key=f"expert_lora.{error.key}") from error


def _expert_values(raw: RawConfig) -> dict[str, object]:
    """What ``expert_lora`` sets for the experts over the values beside it."""
    values = raw.get("expert_lora")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise wrong_value("expert_lora", values, "an object or null")
    return values


def _strategy(raw: RawConfig, strategies: Mapping[str, Strategy], default: Strategy | None) -> Strategy:
    key = "routing_strategy"
    name = text_or_none(raw, key)
    if name is None and default is not None:
        return default
    if name is None or name not in strategies:
        got = "missing" if name is None else f"{shown(name)} is not served for this peft_type"
        raise AdapterFileError(f"{key} in {CONFIG_NAME}: {got}; expected {', '.join(strategies)}", key=key)
    return strategies[name]


def _routing(raw: RawConfig, scope: RoutingScope, strategy: Strategy) -> Routing:
    num_experts = read_integer("num_experts", raw["num_experts"], 1, MAX_EXPERTS)
    activation = _activation(raw) if scope == "ffn" else None
    if strategy == "top-k":
        limit = read_integer("top_k", _value(raw, "top_k", 2), 1, num_experts)
        return Routing(scope, num_experts, limit, renormalize=True, activation=activation)
    if strategy == "switch":
        return Routing(scope, num_experts, 1, renormalize=False, activation=activation)
    if strategy == "dense":
        return Routing(scope, num_experts, num_experts, renormalize=False, activation=activation)
    return Routing(
        scope,
        num_experts,
        num_experts,
        renormalize=False,
        top_p=_top_p(raw),
        temperature=_temperature(raw),
        activation=activation,
    )


def _value(raw: RawConfig, key: str, default: object) -> object:
    return default if raw.get(key) is None else raw[key]


def _top_p(raw: RawConfig) -> float:
    top_p = read_number("top_p", _value(raw, "top_p", 0.8))
    if not 0 < top_p <= 1:
        raise wrong_value("top_p", top_p, "a number above 0, at most 1")
    return top_p


def _temperature(raw: RawConfig) -> float:
    temperature = read_number("temperature", _value(raw, "temperature", 0.0))
    if temperature < 0:
        raise wrong_value("temperature", temperature, "0 or a number above")
    return temperature


def _activation(raw: RawConfig) -> str | None:
    name = text_or_none(raw, "act_fn")
    if name is None:
        return None
    if name not in _ACTIVATIONS:
        raise AdapterFileError(
            f"act_fn in {CONFIG_NAME}: {shown(name)} is not served; expected {', '.join(_ACTIVATIONS)} or null",
            key="act_fn",
        )
    return _ACTIVATIONS[name]
