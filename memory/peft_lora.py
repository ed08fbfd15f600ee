"""PEFT LoRA, plain, rank-stabilised, weight-decomposed (DoRA) or activated: from its keys to low-rank pairs."""

from __future__ import annotations

import re

import torch

from loraplex.memory.adapted_modules import NUMBER, Place, group_keys, layer_place, other_base_problem
from loraplex.memory.adapter_config import CONFIG_NAME, LoraConfig, RawConfig
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_family import Outline, in_image_order, missing_targets
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_spec import LAYER_SITES, AdapterSpec, BaseShape, BaseWeights
from loraplex.memory.low_rank_pairs import read_pairs
from loraplex.memory.tensor_checks import FLOAT_DTYPES, dims
from loraplex.memory.tensor_file import TensorFile, TensorListing

_PREFIX = "base_model.model."
_LAYER_MODULE = re.compile(rf"model\.layers\.{NUMBER}\.(self_attn|mlp)\.(\w+)")
_MODEL_MODULES = {"lm_head": "lm_head", "model.embed_tokens": "embed_tokens"}
_BASE_COPY = re.compile(re.escape(_PREFIX) + r"(lm_head|model\.embed_tokens)\.(?:base_layer\.)?weight")
_TRAINING_ONLY = re.compile(re.escape(_PREFIX) + r".+\.(lora_velora_embed|lora_monteclora_sampler\.\w+)")
"""What VeLoRA and MonteCLoRA keep for training; at inference both are plain LoRA."""

_UNSERVED = (
    (re.compile(r"\.lora_diag$"), "KaSA is not served"),
    (re.compile(r"\.lora_B\.bias$"), "a bias on lora_B is not served yet"),
    (re.compile(r"trainable_tokens|token_adapter"), "trained token embeddings are not served yet"),
    (re.compile(r"modules_to_save"), "fully trained modules are not served yet"),
    (re.compile(r"\.base_layer\.|_proj\.weight$"), "weights of the base model do not belong into an adapter"),
    (re.compile(r"\.bias$"), "trained biases are not served yet"),
    (
        re.compile(r"^(mixlora|mola|loramoe|meteora|tokenwise)\."),
        f"a tensor of a mixture, but peft_type in {CONFIG_NAME} names none",
    ),
)


def read_lora(
    raw: RawConfig,
    file: TensorFile,
    *,
    shape: BaseShape,
    dtype: torch.dtype | None = None,
    base_weights: BaseWeights | None = None,
) -> AdapterSpec:
    """Check a PEFT LoRA against the served base and describe it neutrally.

    Args:
        raw: the configuration; ``peft_type`` is LORA.
        file: its tensors.
        shape: what the base offers.
        dtype: of the served model; values beyond its range are refused.
        base_weights: the base's own. DoRA's gains follow from them. PEFT saves copies of ``embed_tokens`` and
            ``lm_head`` beside their LoRA; a copy is accepted only where it can be seen to equal these.

    Errors: AdapterFileError naming the key, and what was expected.
    """
    config = LoraConfig.parse(raw)
    _check_invocation(config, shape)
    keys = [key for key in file.tensors if not _is_base_copy(key, file.tensors[key], base_weights)]
    modules = group_keys(_without_training(keys), _place, _unknown)
    pairs, _ = read_pairs(modules, lambda _: config, file.tensors, shape=shape, dtype=dtype, base_weights=base_weights)
    if not pairs:
        raise AdapterFileError(f"{file.name}: holds no LoRA tensors, so it would answer as the base", key=file.name)
    kind = _kind(config)
    return AdapterSpec(
        identity=adapter_identity(kind, file.digest, config.settings),
        kind=kind,
        pairs=pairs,
        warnings=(*config.warnings, *missing_targets(config.target_modules, [pair.site for pair in pairs])),
        invocation=config.invocation,
    )


def outline_lora(raw: RawConfig, listing: TensorListing) -> Outline:
    """Describe a folder by its configuration and the header of its tensors' file."""
    config = LoraConfig.parse(raw)
    if listing.shapes is None:
        rank = config.max_rank
        targets = in_image_order(target.rsplit(".", 1)[-1] for target in config.target_modules)
    else:
        keys = [key for key in listing.shapes if _base_copy_site(key) is None]
        modules = group_keys(_without_training(keys), _place, _unknown)
        shapes = [listing.shapes[module.key("A")] for module in modules]
        rank = max((shape[0] for shape in shapes if shape), default=0)
        targets = in_image_order(module.place.site for module in modules)
    return Outline(_kind(config), config.settings, rank, targets, invocation=config.invocation)


def _kind(config: LoraConfig) -> str:
    if config.invocation:
        return "alora"
    return "dora" if config.use_dora else "lora"


def _check_invocation(config: LoraConfig, shape: BaseShape) -> None:
    if not config.invocation:
        return
    vocab_size = shape.features("embed_tokens")[0]
    if max(config.invocation) >= vocab_size:
        key = "alora_invocation_tokens"
        raise AdapterFileError(
            f"{key} in {CONFIG_NAME}: {max(config.invocation)} is no token of the served base; expected 0 to "
            f"{vocab_size - 1}",
            key=key,
        )


def _without_training(keys: list[str]) -> list[str]:
    return [key for key in keys if not _TRAINING_ONLY.fullmatch(key)]


def _place(stem: str) -> Place | None:
    path = stem.removeprefix(_PREFIX)
    if path == stem:
        return None
    if path in _MODEL_MODULES:
        return Place(_MODEL_MODULES[path], None)
    match = _LAYER_MODULE.fullmatch(path)
    return None if match is None else layer_place(match[1], match[2], match[3])


def _unknown(key: str) -> AdapterFileError:
    sentence = next((sentence for pattern, sentence in _UNSERVED if pattern.search(key)), None)
    if sentence is None:
        sentence = other_base_problem(key)
    if sentence is None:
        sentence = (
            f"unknown tensor; expected {_PREFIX}MODULE.lora_A.weight, .lora_B.weight or .lora_magnitude_vector, where "
            f"MODULE is model.layers.N.self_attn.{{{','.join(LAYER_SITES[:4])}}}, "
            f"model.layers.N.mlp.{{{','.join(LAYER_SITES[4:])}}} or lm_head, or {_PREFIX}model.embed_tokens"
            ".lora_embedding_A or .lora_embedding_B"
        )
    return AdapterFileError(f"{shown(key)}: {sentence}", key=key)


def _base_copy_site(key: str) -> str | None:
    match = None if ".lora_" in key else _BASE_COPY.fullmatch(key)
    return None if match is None else _MODEL_MODULES[match[1]]


def _is_base_copy(key: str, tensor: torch.Tensor, base_weights: BaseWeights | None) -> bool:
    """Whether a key holds a copy of the base's own embedding or head, which the adapter can do without.

    Errors: AdapterFileError where the copy differs from the base, or cannot be compared.
    """
    site = _base_copy_site(key)
    if site is None:
        return False
    if base_weights is None:
        raise AdapterFileError(
            f"{shown(key)}: a copy of the base's {site}, which an adapter must not replace. Save the adapter again "
            "with PEFT: model.save_pretrained(OUT, save_embedding_layers=False)",
            key=key,
        )
    own = base_weights.matrix(site)
    if not _equal(tensor, own):
        raise AdapterFileError(
            f"{shown(key)}: differs from the served base's {site} {dims(own.shape)}; an adapter that was trained on "
            "other embeddings cannot be served on this base",
            key=key,
        )
    return True


def _equal(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two weights are the same but for the dtype in which one of them was kept."""
    if copy.shape != own.shape or copy.dtype not in FLOAT_DTYPES:
        return False
    own = own.cpu()
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))
