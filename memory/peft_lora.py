"""PEFT LoRA: from its tensor keys and its configuration to low-rank pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from loraplex.memory.adapter_config import LoraConfig, RawConfig
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_spec import LAYER_SITES, MODEL_SITES, AdapterSpec, BaseShape, LowRankPair
from loraplex.memory.tensor_file import TensorFile, TensorListing

_PREFIX = "base_model.model."
_HALF = re.compile(re.escape(_PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_LAYER_MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(self_attn|mlp)\.([a-z]+_proj)")
_MODEL_MODULES = {"lm_head": "lm_head", "model.embed_tokens": "embed_tokens"}
_BASE_COPY = re.compile(re.escape(_PREFIX) + r"(lm_head|model\.embed_tokens)\.(?:base_layer\.)?weight")
_TRAINING_ONLY = re.compile(re.escape(_PREFIX) + r".+\.(lora_velora_embed|lora_monteclora_sampler\.\w+)")
"""What VeLoRA and MonteCLoRA keep for training; at inference both are plain LoRA."""

_UNSERVED = (
    (re.compile(r"lora_magnitude_vector"), "DoRA is not served yet"),
    (re.compile(r"\.lora_diag$"), "KaSA is not served"),
    (re.compile(r"\.lora_B\.bias$"), "a bias on lora_B is not served yet"),
    (re.compile(r"trainable_tokens|token_adapter"), "trained token embeddings are not served yet"),
    (re.compile(r"modules_to_save"), "fully trained modules are not served yet"),
    (re.compile(r"\.base_layer\.|_proj\.weight$"), "weights of the base model do not belong into an adapter"),
    (re.compile(r"\.bias$"), "trained biases are not served yet"),
    (re.compile(r"^(mixlora|mola|loramoe|meteora|tokenwise)\."), "mixtures of LoRA are not served yet"),
)

_SERIAL_ELEMENTS = 32_768
"""torch shares out larger operations to its threads; a loader that waits for them, while the model keeps them busy,
takes ten times as long."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(slots=True)
class _Module:
    """A module of the base model with the tensor keys found for it."""

    path: str
    site: str
    layer: int | None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def half_names(self) -> tuple[str, str]:
        """Endings of the keys of A and B."""
        if self.site == "embed_tokens":
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    @property
    def place(self) -> tuple[int, int]:
        """Sorts modules by layer, then in image order, those of the whole model last."""
        order = (*LAYER_SITES, *MODEL_SITES).index(self.site)
        return (1 << 31 if self.layer is None else self.layer, order)


def read_lora(
    raw: RawConfig,
    file: TensorFile,
    *,
    shape: BaseShape,
    dtype: torch.dtype | None = None,
    base_weights: Mapping[str, torch.Tensor] | None = None,
) -> AdapterSpec:
    """Check a PEFT LoRA against the served base and describe it neutrally.

    Args:
        raw: the configuration; ``peft_type`` is LORA.
        file: its tensors.
        shape: what the base offers.
        dtype: of the served model; values beyond its range are refused.
        base_weights: the base's own ``embed_tokens [vocab, hidden]`` and ``lm_head``. PEFT saves a copy of them beside
            their LoRA; a copy is accepted only where it can be seen to equal these.

    Errors: AdapterFileError naming the key, and what was expected.
    """
    config = LoraConfig.parse(raw)
    keys = [key for key in file.tensors if not _is_base_copy(key, file.tensors[key], base_weights)]
    modules = _group(keys)
    pairs = tuple(_pair(module, config, file.tensors, shape, dtype) for module in modules)
    if not pairs:
        raise AdapterFileError(f"{file.name}: holds no LoRA tensors, so it would answer as the base", key=file.name)
    identity = adapter_identity("lora", file.digest, config.settings)
    return AdapterSpec(identity, "lora", pairs, (*config.warnings, *_missing_targets(config, modules)))


def outline_lora(raw: RawConfig, listing: TensorListing) -> tuple[int, tuple[str, ...]]:
    """Largest rank and adapted sites, from the configuration and the header of the tensors' file."""
    config = LoraConfig.parse(raw)
    if listing.shapes is None:
        named = {target.rsplit(".", 1)[-1] for target in config.target_modules}
        return config.max_rank, _in_image_order(named)
    modules = _group(key for key in listing.shapes if _base_copy_site(key) is None)
    ranks = [listing.shapes[key][:1] for module in modules for name, key in module.keys.items() if "_A" in name]
    return max((rank[0] for rank in ranks if rank), default=0), _in_image_order({module.site for module in modules})


def _in_image_order(names: set[str]) -> tuple[str, ...]:
    return tuple(site for site in (*LAYER_SITES, *MODEL_SITES) if site in names)


def _missing_targets(config: LoraConfig, modules: list[_Module]) -> list[str]:
    named = _in_image_order(set(config.target_modules))
    present = {module.site for module in modules}
    return [f"target_modules names {site}, but there are no tensors for it" for site in named if site not in present]


def _group(keys: Iterable[str]) -> list[_Module]:
    """Sort the keys of the two halves by module. Errors: AdapterFileError for a key that is neither."""
    modules: dict[str, _Module] = {}
    for key in keys:
        match = _HALF.fullmatch(key)
        if match is None:
            if _TRAINING_ONLY.fullmatch(key):
                continue
            raise _unknown(key)
        path, half = match.groups()
        if path not in modules:
            modules[path] = _module(path, key)
        if half not in modules[path].half_names:
            raise _unknown(key)
        modules[path].keys[half] = key
    return sorted(modules.values(), key=lambda module: module.place)


def _module(path: str, key: str) -> _Module:
    if path in _MODEL_MODULES:
        return _Module(path, _MODEL_MODULES[path], None)
    match = _LAYER_MODULE.fullmatch(path)
    if match is None:
        raise _unknown(key)
    layer, block, site = match.groups()
    if site not in LAYER_SITES or (block == "self_attn") != (site in LAYER_SITES[:4]):
        raise _unknown(key)
    return _Module(path, site, int(layer))


def _unknown(key: str) -> AdapterFileError:
    for pattern, sentence in _UNSERVED:
        if pattern.search(key):
            return AdapterFileError(f"{shown(key)}: {sentence}", key=key)
    return AdapterFileError(
        f"{shown(key)}: unknown tensor; expected {_PREFIX}MODULE.lora_A.weight or .lora_B.weight, where MODULE is "
        f"model.layers.N.self_attn.{{{','.join(LAYER_SITES[:4])}}}, model.layers.N.mlp.{{{','.join(LAYER_SITES[4:])}}} "
        f"or lm_head, or {_PREFIX}model.embed_tokens.lora_embedding_A or .lora_embedding_B",
        key=key,
    )


def _base_copy_site(key: str) -> str | None:
    match = None if ".lora_" in key else _BASE_COPY.fullmatch(key)
    return None if match is None else _MODEL_MODULES[match[1]]


def _is_base_copy(key: str, tensor: torch.Tensor, base_weights: Mapping[str, torch.Tensor] | None) -> bool:
    """Whether a key holds a copy of the base's own embedding or head, which the adapter can do without.

    Errors: AdapterFileError where the copy differs from the base, or cannot be compared.
    """
    site = _base_copy_site(key)
    if site is None:
        return False
    own = (base_weights or {}).get(site)
    if own is None:
        raise AdapterFileError(
            f"{shown(key)}: a copy of the base's {site}, which an adapter must not replace. Save the adapter again "
            "with PEFT: model.save_pretrained(OUT, save_embedding_layers=False)",
            key=key,
        )
    if not _equal(tensor, own):
        raise AdapterFileError(
            f"{shown(key)}: differs from the served base's {site} {_dims(own.shape)}; an adapter that was trained on "
            "other embeddings cannot be served on this base",
            key=key,
        )
    return True


def _equal(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two weights are the same but for the dtype in which one of them was kept."""
    if copy.shape != own.shape or copy.dtype not in _DTYPES:
        return False
    own = own.cpu()
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


def _pair(
    module: _Module,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    shape: BaseShape,
    dtype: torch.dtype | None,
) -> LowRankPair:
    a_key, b_key = _both_halves(module)
    a, b = tensors[a_key], tensors[b_key]
    in_features, out_features = _features(module, shape, a_key)
    rank = config.rank_of(module.path)
    _check_shape(a_key, a, (rank, in_features), f"[rank, in] of {module.site}")
    _check_shape(b_key, b, (out_features, rank), f"[out, rank] of {module.site}")
    for key, tensor in ((a_key, a), (b_key, b)):
        _check_values(key, tensor, dtype)
    return LowRankPair(module.site, module.layer, a, b, config.scale_of(module.path))


def _both_halves(module: _Module) -> tuple[str, str]:
    for name in module.half_names:
        if name not in module.keys:
            missing = f"{_PREFIX}{module.path}.{name}"
            raise AdapterFileError(f"{missing}: missing; a LoRA needs both of its halves", key=missing)
    a_name, b_name = module.half_names
    return module.keys[a_name], module.keys[b_name]


def _features(module: _Module, shape: BaseShape, key: str) -> tuple[int, int]:
    if module.layer is not None and module.layer >= shape.num_layers:
        raise AdapterFileError(
            f"{key}: layer {module.layer} does not exist; the served base has layers 0 to {shape.num_layers - 1}",
            key=key,
        )
    try:
        return shape.features(module.site)
    except KeyError:
        raise AdapterFileError(f"{key}: the served base has no {module.site}", key=key) from None


def _check_shape(key: str, tensor: torch.Tensor, expected: tuple[int, int], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise AdapterFileError(
            f"{key}: shape {_dims(tensor.shape)}, expected {_dims(expected)}, {meaning} by the served base and the "
            "configured rank",
            key=key,
        )


def _dims(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_values(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    if tensor.dtype not in _DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise AdapterFileError(f"{key}: dtype {name}, expected float16, bfloat16, float32 or float64", key=key)
    extremes = _extremes(tensor)
    if not extremes.isfinite().all():
        raise AdapterFileError(f"{key}: holds NaN or infinite values, expected finite ones", key=key)
    if dtype is not None and not extremes.to(dtype).isfinite().all():
        raise AdapterFileError(
            f"{key}: values up to {extremes.abs().max().item():.4g} do not fit the served model's {dtype}; its largest "
            f"is {torch.finfo(dtype).max:.4g}",
            key=key,
        )


def _extremes(tensor: torch.Tensor) -> torch.Tensor:
    """Smallest and largest values [2, n], by blocks; a NaN makes those of its block NaN."""
    blocks = tensor.reshape(-1).split(_SERIAL_ELEMENTS)
    return torch.stack([torch.stack(torch.aminmax(block)) for block in blocks], dim=1)
