"""Mixtures of LoRA: what all their families have in common, and the little that tells one from another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from loraplex.memory.adapted_modules import AdaptedModule, Place, group_keys, other_base_problem
from loraplex.memory.adapter_config import CONFIG_NAME, LoraConfig, RawConfig
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_family import Outline, in_image_order, missing_targets
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_spec import FFN, AdapterSpec, BaseShape, BaseWeights, Router, RoutingScope, TokenRoutes
from loraplex.memory.low_rank_pairs import features_of, read_pairs
from loraplex.memory.mixture_config import MixtureConfig, Strategy
from loraplex.memory.tensor_checks import check_shape, check_values
from loraplex.memory.tensor_file import TensorFile, TensorListing
from loraplex.memory.token_routes import token_routes

RouterPlace = tuple[int | None, str]
"""Layer and site of a router, as in ``Router``; (None, WHOLE_MODEL) for the one of a token-wise mixture."""

WHOLE_MODEL = "model"


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """The keys of a file, sorted and complete."""

    modules: tuple[AdaptedModule, ...]
    routers: Mapping[RouterPlace, str]


@dataclass(frozen=True, slots=True)
class MixtureFamily:
    """A family of mixtures.

    Attributes:
        kind: as in ``AdapterSpec``.
        scope: of its experts.
        strategies: ways to choose experts, by ``routing_strategy``.
        default_strategy: where there is no ``routing_strategy``; None if it must be there.
        allow_dora: whether pairs may have magnitudes.
        place_of: the place that the part of a key before ``.lora_A.weight`` and the like names; None if it is unknown.
        router_of: the place of a router, of a key; None for another key.
        router_key: the key of a router, as the family writes it today.
        expected: the tensors that the family has, for messages.
        aliases: other names of sites in ``target_modules``.
    """

    kind: str
    scope: RoutingScope
    strategies: Mapping[str, Strategy]
    default_strategy: Strategy | None
    allow_dora: bool
    place_of: Callable[[str], Place | None]
    router_of: Callable[[str], RouterPlace | None]
    router_key: Callable[[RouterPlace], str]
    expected: str
    aliases: Mapping[str, str]

    def read(
        self,
        raw: RawConfig,
        file: TensorFile,
        *,
        shape: BaseShape,
        dtype: torch.dtype | None = None,
        base_weights: BaseWeights | None = None,
    ) -> AdapterSpec:
        """Check a folder's content against the served base and describe it neutrally.

        Errors: AdapterFileError naming the key, and what was expected.
        """
        config = self._config(raw)
        arrangement = self._arrange(file.tensors, config, file.name)

        def config_of(module: AdaptedModule) -> LoraConfig:
            return config.plain if module.place.expert is None else config.expert

        pairs, without_gain = read_pairs(
            arrangement.modules,
            config_of,
            file.tensors,
            shape=shape,
            dtype=dtype,
            base_weights=base_weights,
            magnitudes="optional",
        )
        routers = {
            place: _router(place, key, file.tensors, shape, config) for place, key in arrangement.routers.items()
        }
        routes = self._token_routes(routers, config, shape, base_weights)
        present = {module.place.site for module in arrangement.modules}
        return AdapterSpec(
            identity=adapter_identity(self.kind, file.digest, config.settings),
            kind=self.kind,
            pairs=pairs,
            warnings=(*_warnings(config), *missing_targets(self._named(config), present), *without_gain),
            routers=tuple(Router(layer, site, routers[layer, site]) for layer, site in routers if layer is not None),
            routing=config.routing,
            token_routes=routes,
        )

    def outline(self, raw: RawConfig, listing: TensorListing) -> Outline:
        """Describe a folder by its configuration and the header of its tensors' file; errors as of ``read``."""
        config = self._config(raw)
        if listing.shapes is None:
            rank = max(config.plain.max_rank, config.expert.max_rank)
            targets = in_image_order(self._named(config))
        else:
            modules = self._arrange(listing.shapes, config, listing.name).modules
            shapes = [listing.shapes[module.key("A")] for module in modules]
            rank = max((shape[0] for shape in shapes if shape), default=0)
            targets = in_image_order(module.place.site for module in modules)
        return Outline(
            kind=self.kind,
            settings=config.settings,
            rank=rank,
            targets=targets,
            num_experts=config.routing.num_experts,
            top_k=config.routing.limit if config.strategy in ("top-k", "switch") else 0,
            routing=config.strategy,
            scope=self.scope,
        )

    def _config(self, raw: RawConfig) -> MixtureConfig:
        return MixtureConfig.parse(
            raw,
            scope=self.scope,
            strategies=self.strategies,
            strategy=self.default_strategy,
            allow_dora=self.allow_dora,
        )

    def _named(self, config: MixtureConfig) -> list[str]:
        """Sites by their names in ``target_modules``."""
        return [self.aliases.get(name, name) for name in config.plain.target_modules]

    def _arrange(self, keys: Collection[str], config: MixtureConfig, file_name: str) -> _Arrangement:
        """Sort the keys, and see that nothing is missing. Errors: AdapterFileError naming a key."""
        routers: dict[RouterPlace, str] = {}
        others = []
        for key in sorted(keys):
            place = self.router_of(key)
            if place is None:
                others.append(key)
            elif place in routers:
                raise _said_twice(key, routers[place])
            else:
                routers[place] = key
        modules = tuple(group_keys(others, self.place_of, self._unknown))
        config.check_cost(len(modules))
        _check_experts(modules, config.routing.num_experts, file_name)
        self._check_routers(modules, routers)
        return _Arrangement(modules, dict(sorted(routers.items(), key=lambda item: (item[0][0] or 0, item[0][1]))))

    def _check_routers(self, modules: Iterable[AdaptedModule], routers: Mapping[RouterPlace, str]) -> None:
        """See that every place that has experts has a router, and no other."""
        needed = {self._router_place(module.place): module for module in modules if module.place.expert is not None}
        for place, module in needed.items():
            if place not in routers:
                key = self.router_key(place)
                raise AdapterFileError(
                    f"{key}: missing; {shown(module.key('A'))} belongs to an expert, which needs this router", key=key
                )
        for place, key in routers.items():
            if place not in needed:
                raise AdapterFileError(f"{shown(key)}: a router without experts; expected tensors of experts", key=key)

    def _router_place(self, place: Place) -> RouterPlace:
        if self.scope == "token":
            return None, WHOLE_MODEL
        return place.layer, FFN if self.scope == "ffn" else place.site

    def _unknown(self, key: str) -> AdapterFileError:
        sentence = other_base_problem(key) or f"unknown tensor; expected {self.expected}"
        return AdapterFileError(f"{shown(key)}: {sentence}", key=key)

    def _token_routes(
        self,
        routers: Mapping[RouterPlace, torch.Tensor],
        config: MixtureConfig,
        shape: BaseShape,
        base_weights: BaseWeights | None,
    ) -> TokenRoutes | None:
        if self.scope != "token":
            return None
        vocab_size = shape.features("embed_tokens")[0]
        return token_routes(routers[None, WHOLE_MODEL], config.routing, base_weights, vocab_size)


def _warnings(config: MixtureConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*config.plain.warnings, *config.expert.warnings)))


def _said_twice(key: str, other: str) -> AdapterFileError:
    return AdapterFileError(f"{shown(key)}: the same router as {shown(other)}; expected one of them", key=key)


def _check_experts(modules: Iterable[AdaptedModule], num_experts: int, file_name: str) -> None:
    """See that every matrix that has experts has all of them, and no pair beside them."""
    by_matrix: dict[tuple[int | None, str], dict[int, AdaptedModule]] = {}
    for module in modules:
        place = module.place
        if place.expert is None:
            continue
        if place.expert >= num_experts:
            raise AdapterFileError(
                f"{shown(module.key('A'))}: expert {place.expert} does not exist; num_experts in {CONFIG_NAME} is "
                f"{num_experts}, so they are 0 to {num_experts - 1}",
                key=module.key("A"),
            )
        by_matrix.setdefault((place.layer, place.site), {})[place.expert] = module
    if not by_matrix:
        raise AdapterFileError(f"{file_name}: holds no experts, so it is no mixture", key=file_name)
    for experts in by_matrix.values():
        _check_complete(experts, num_experts)
    for module in modules:
        if module.place.expert is None and (module.place.layer, module.place.site) in by_matrix:
            key = module.key("A")
            raise AdapterFileError(f"{shown(key)}: a pair beside experts on one matrix; expected one or other", key=key)


def _check_complete(experts: Mapping[int, AdaptedModule], num_experts: int) -> None:
    for expert in range(num_experts):
        if expert not in experts:
            present, module = next(iter(experts.items()))
            missing = module.key("A").replace(f".experts.{present}.", f".experts.{expert}.")
            raise AdapterFileError(
                f"{missing}: missing; num_experts in {CONFIG_NAME} is {num_experts}, and a matrix with experts needs "
                f"all of 0 to {num_experts - 1}",
                key=missing,
            )


def _router(
    place: RouterPlace, key: str, tensors: Mapping[str, torch.Tensor], shape: BaseShape, config: MixtureConfig
) -> torch.Tensor:
    """The checked weight [num_experts, in_features] of a router."""
    layer, site = place
    read_by = {FFN: "gate_proj", WHOLE_MODEL: "q_proj"}.get(site, site)
    in_features = features_of(read_by, layer, shape, key)[0]
    weight = tensors[key]
    meaning = f"[num_experts, in] by {CONFIG_NAME} and the input of {read_by} in the served base"
    check_shape(key, weight, (config.routing.num_experts, in_features), meaning)
    check_values(key, weight, torch.float32)
    return weight
