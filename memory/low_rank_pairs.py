"""From an adapter's tensors to checked low-rank pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from loraplex.memory.adapted_modules import AdaptedModule
from loraplex.memory.adapter_config import CONFIG_NAME, LoraConfig
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import BaseShape, BaseWeights, LowRankPair
from loraplex.memory.dora_gains import Magnitude, gains_of
from loraplex.memory.tensor_checks import check_shape, check_values

Magnitudes = Literal["required", "optional"]
"""Whether DoRA pairs may come without their magnitudes: PEFT saves them, the programs that train MixDoRA do not."""


def read_pairs(
    modules: Sequence[AdaptedModule],
    config_of: Callable[[AdaptedModule], LoraConfig],
    tensors: Mapping[str, torch.Tensor],
    *,
    shape: BaseShape,
    dtype: torch.dtype | None,
    base_weights: BaseWeights | None,
    magnitudes: Magnitudes = "required",
) -> tuple[tuple[LowRankPair, ...], tuple[str, ...]]:
    """The pairs of the modules, in their order, with DoRA's gains; and what to warn of.

    Args:
        modules: with their keys.
        config_of: rank, scale and DoRA of a module.
        tensors: by key.
        shape, dtype, base_weights: as in ``read_adapter``.
        magnitudes: whether DoRA without them is an error, or a gain of 1 and a warning.

    Errors: AdapterFileError naming the key, and what was expected.
    """
    pairs = [_pair(module, config_of(module), tensors, shape, dtype) for module in modules]
    found: dict[int, Magnitude] = {}
    missing: list[AdaptedModule] = []
    for index, module in enumerate(modules):
        if "magnitude" in module.keys:
            _check_flag(module, config_of(module))
            found[index] = _magnitude(module, tensors, pairs[index])
        elif config_of(module).use_dora:
            missing.append(module)
    if missing and magnitudes == "required":
        key = missing[0].key("magnitude")
        raise AdapterFileError(f"{key}: missing; use_dora in {CONFIG_NAME} is true, and DoRA needs it", key=key)
    if found:
        gains = gains_of([pairs[index] for index in found], list(found.values()), base_weights, dtype)
        for index, gain in zip(found, gains, strict=True):
            pairs[index] = dataclasses.replace(pairs[index], gain=gain)
    return tuple(pairs), _without_gain(missing, len(pairs))


def _without_gain(missing: Sequence[AdaptedModule], count: int) -> tuple[str, ...]:
    if not missing:
        return ()
    return (
        f"use_dora in {CONFIG_NAME} is true, but {len(missing)} of {count} pairs have no lora_magnitude_vector (first "
        f"{shown(missing[0].key('magnitude'))}); their gains are 1",
    )


def _check_flag(module: AdaptedModule, config: LoraConfig) -> None:
    if not config.use_dora:
        key = module.key("magnitude")
        raise AdapterFileError(
            f"{shown(key)}: a magnitude of DoRA, but use_dora in {CONFIG_NAME} is not true for it", key=key
        )


def _magnitude(module: AdaptedModule, tensors: Mapping[str, torch.Tensor], pair: LowRankPair) -> Magnitude:
    key = module.key("magnitude")
    values = tensors[key]
    check_shape(key, values, (pair.b.shape[0],), f"[out] of {pair.site} by the served base")
    check_values(key, values, torch.float32)
    return Magnitude(key, values)


def _pair(
    module: AdaptedModule,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    shape: BaseShape,
    dtype: torch.dtype | None,
) -> LowRankPair:
    place = module.place
    a_key, b_key = module.key("A"), module.key("B")
    a, b = tensors[a_key], tensors[b_key]
    in_features, out_features = features_of(place.site, place.layer, shape, a_key)
    rank = config.rank_of(place.path, place.expert)
    check_shape(a_key, a, (rank, in_features), f"[rank, in] of {place.site} {_BY}")
    check_shape(b_key, b, (out_features, rank), f"[out, rank] of {place.site} {_BY}")
    for key, tensor in ((a_key, a), (b_key, b)):
        check_values(key, tensor, dtype)
    return LowRankPair(place.site, place.layer, a, b, config.scale_of(place.path, place.expert), place.expert)


_BY = "by the served base and the configured rank"


def features_of(site: str, layer: int | None, shape: BaseShape, key: str) -> tuple[int, int]:
    """(in_features, out_features) of a matrix of the base; AdapterFileError naming ``key`` if the base lacks it."""
    if layer is not None and layer >= shape.num_layers:
        raise AdapterFileError(
            f"{key}: layer {layer} does not exist; the served base has layers 0 to {shape.num_layers - 1}", key=key
        )
    try:
        return shape.features(site)
    except KeyError:
        raise AdapterFileError(f"{key}: the served base has no {site}", key=key) from None
