"""PiSSA, OLoRA and their like, to plain LoRA: initialisations that took a low-rank part from the base's weights.

They set A_0 and B_0 from W and train on ``W - s B_0 A_0``. On the unchanged base, the adapter is the difference:
``s B A - s B_0 A_0 = s [B, -B_0] [A; A_0]``, a LoRA of twice the rank with the same scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from loraplex.memory.adapted_modules import NUMBER, AdaptedModule, Place, group_keys, layer_place
from loraplex.memory.adapter_config import CONFIG_NAME, LoraConfig, RawConfig, read_config
from loraplex.memory.adapter_convert import AdapterContent
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_spec import BaseWeights
from loraplex.memory.tensor_file import read_tensor_file

_INIT = "init_lora_weights"
_PREFIX = "base_model.model."
_MODEL_MODULES = {"lm_head": "lm_head", "model.embed_tokens": "embed_tokens"}
_LAYER_MODULE = re.compile(rf"model\.layers\.{NUMBER}\.(self_attn|mlp)\.([a-z]+_proj)")
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [rank, in] and B [out, rank]."""


def pissa_factors(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """PiSSA's start (https://arxiv.org/abs/2404.02948) from ``weight [out, in]``: with ``W = U S V^T``, the largest
    singular values divided by the scale, their roots to both sides."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    roots = (s[:rank] / scale).sqrt()
    return roots[:, None] * vh[:rank], u[:, :rank] * roots


def olora_factors(weight: torch.Tensor, rank: int) -> Factors:
    """OLoRA's start (https://arxiv.org/abs/2406.01775) from ``weight [out, in]``: the first rows of R and columns of Q
    of ``W = Q R``. The scale has no part in it."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].contiguous(), q[:, :rank].contiguous()


_REPEATABLE = ("pissa", "olora")
"""Initialisations that are computed again from the base alone, by their names in PEFT."""


def is_subtracted(raw: RawConfig) -> bool:
    """Whether a configuration names an initialisation that changed the base."""
    return str(raw.get(_INIT)).lower().startswith(_SUBTRACTED)


def plain_from_initialised(
    path: Path, base_weights: BaseWeights | None, *, initial: Path | None = None, allow_bin: bool = False
) -> AdapterContent:
    """A plain LoRA, or plain DoRA, for the unchanged base.

    Args:
        path: folder of the trained adapter.
        base_weights: of the base before training; can be spared with ``initial``.
        initial: folder of the adapter as it was before training, where it was saved. PiSSA with the exact singular
            values ("pissa") and OLoRA are computed again without it.

    Errors: AdapterFileError naming the key, and what was expected.
    """
    raw = read_config(path)
    config = _config(raw)
    start = _Saved.read(initial, config, allow_bin) if initial else _Recomputed(raw, config, base_weights)
    trained = read_tensor_file(path, allow_bin=allow_bin, max_bytes=None).tensors
    tensors: dict[str, torch.Tensor] = {}
    num_odd, modules = 0, group_keys(trained, _place, _unknown)
    for module in modules:
        a_key, b_key = module.key("A"), module.key("B")
        _check_untied(module, base_weights)
        a0, b0 = start.factors(module)
        _check_fits(a_key, trained[a_key], a0)
        _check_fits(b_key, trained[b_key], b0)
        tensors[a_key] = torch.cat([trained[a_key], a0])
        tensors[b_key] = torch.cat([trained[b_key], -b0], dim=1)
        tensors |= {key: trained[key] for part, key in module.keys.items() if part == "magnitude"}
        num_odd += bool(_product_norm(tensors[a_key], tensors[b_key]) > _product_norm(a0, b0))
    return AdapterContent(_doubled(raw, config), tensors, _warnings(num_odd, len(modules)))


class _Recomputed:
    """Where training started, from the base's weights."""

    def __init__(self, raw: RawConfig, config: LoraConfig, base_weights: BaseWeights | None) -> None:
        init = raw.get(_INIT)
        self._name = init.lower() if isinstance(init, str) else ""
        if self._name not in _REPEATABLE:
            raise AdapterFileError(
                f"{_INIT} in {CONFIG_NAME}: where {shown(init)} started cannot be computed again; expected "
                f"{' or '.join(_REPEATABLE)}, or the folder of the adapter as it was before training (--initial)",
                key=_INIT,
            )
        if base_weights is None:
            raise AdapterFileError(
                f"{_INIT} in {CONFIG_NAME}: where {shown(init)} started follows from the base's weights; give the base "
                "model (--base), or the adapter as it was before training (--initial)",
                key=_INIT,
            )
        self._config = config
        self._base_weights = base_weights

    def factors(self, module: AdaptedModule) -> Factors:
        place = module.place
        if place.site == "embed_tokens":
            key = module.key("A")
            raise AdapterFileError(f"{shown(key)}: cannot be computed again for an embedding; give --initial", key=key)
        weight = self._base_weights.matrix(place.site, place.layer)
        rank = self._config.rank_of(place.path)
        if self._name == "olora":
            return olora_factors(weight, rank)
        return pissa_factors(weight, rank, self._config.scale_of(place.path))


class _Saved:
    """Where training started, as it was saved."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @classmethod
    def read(cls, folder: Path, trained: LoraConfig, allow_bin: bool) -> _Saved:
        """Errors: AdapterFileError if the folder cannot be read, or is another adapter's."""
        first = _config(read_config(folder)).settings
        for key, value in trained.settings.items():
            if first.get(key) != value:
                raise AdapterFileError(
                    f"{key} in {CONFIG_NAME} of {shown(str(folder))}: expected {shown(value)} as in the trained "
                    f"adapter, got {shown(first.get(key))}",
                    key=key,
                )
        return cls(read_tensor_file(folder, allow_bin=allow_bin, max_bytes=None).tensors)

    def factors(self, module: AdaptedModule) -> Factors:
        for key in (module.key("A"), module.key("B")):
            if key not in self._tensors:
                raise AdapterFileError(
                    f"{shown(key)}: not in the adapter as it was before training; expected what the trained one holds",
                    key=key,
                )
        a, b = self._tensors[module.key("A")], self._tensors[module.key("B")]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            key = module.key("B")
            raise AdapterFileError(
                f"{shown(key)}: shape {list(b.shape)} beside an A of shape {list(a.shape)}; expected [out, rank] and "
                "[rank, in]",
                key=key,
            )
        return a, b


def _config(raw: RawConfig) -> LoraConfig:
    """The configuration as it counts beside the initialisation."""
    if raw.get("peft_type") not in (None, "LORA"):
        raise AdapterFileError(
            f"peft_type in {CONFIG_NAME}: expected LORA, got {shown(raw['peft_type'])}", key="peft_type"
        )
    if isinstance(raw.get(_INIT), str) and not is_subtracted(raw):
        raise AdapterFileError(
            f"{_INIT} in {CONFIG_NAME}: {shown(raw[_INIT])} took nothing from the base that could be put back; "
            f"expected {', '.join(_SUBTRACTED)}, true or false",
            key=_INIT,
        )
    return LoraConfig.parse({**raw, _INIT: True})


def _place(stem: str) -> Place | None:
    path = stem.removeprefix(_PREFIX)
    if path in _MODEL_MODULES:
        return Place(_MODEL_MODULES[path], None)
    match = _LAYER_MODULE.fullmatch(path)
    return None if match is None else layer_place(*match.groups())


def _unknown(key: str) -> AdapterFileError:
    return AdapterFileError(
        f"{shown(key)}: expected lora_A, lora_B or lora_magnitude_vector of a linear or of embed_tokens, as PEFT names "
        "them",
        key=key,
    )


def _check_fits(key: str, trained: torch.Tensor, start: torch.Tensor) -> None:
    if trained.shape != start.shape:
        raise AdapterFileError(
            f"{shown(key)}: shape {list(trained.shape)}, expected {list(start.shape)} by the adapter as it was before "
            "training",
            key=key,
        )


def _check_untied(module: AdaptedModule, base_weights: BaseWeights | None) -> None:
    """What was taken from a matrix that is embedding and head at once changed both, and an adapter adds to one."""
    if module.place.layer is not None or base_weights is None:
        return
    if torch.equal(base_weights.matrix("embed_tokens"), base_weights.matrix("lm_head")):
        key = module.key("A")
        raise AdapterFileError(
            f"{shown(key)}: the base's lm_head is its embed_tokens, so both were changed, which no LoRA undoes; "
            "expected linears of layers",
            key=key,
        )


def _product_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of ``b @ a``, which is not formed: ``|B A|^2 = sum((B^T B) * (A A^T))``."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def _doubled(raw: RawConfig, config: LoraConfig) -> dict[str, object]:
    """The configuration of an adapter of twice the ranks and the same scales."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        **raw,
        _INIT: True,
        "r": 2 * config.rank,
        "lora_alpha": factor * config.alpha,
        "rank_pattern": {pattern.key: 2 * int(pattern.value) for pattern in config.rank_pattern},
        "alpha_pattern": {pattern.key: factor * pattern.value for pattern in config.alpha_pattern},
    }


def _warnings(num_odd: int, num_modules: int) -> tuple[str, ...]:
    if 2 * num_odd <= num_modules:
        return ()
    return (
        f"on {num_odd} of {num_modules} modules the training moved further than from its start to zero; is this the "
        "base that it began with?",
    )
