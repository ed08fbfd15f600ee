"""Adapter folders: found, described from their headers, and read with every check.

What a folder may hold is in the documentation of each family of adapters. A family is a module with a reader and an
outline, registered in ``FAMILIES`` under the ``peft_type`` that names it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from loraplex.memory.adapter_blueprint import Blueprints
from loraplex.memory.adapter_config import (
    CONFIG_NAME,
    RawConfig,
    parse_config,
    read_config,
    read_config_file,
    text_or_none,
)
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.adapter_family import Family, Outline
from loraplex.memory.adapter_hash import adapter_identity
from loraplex.memory.adapter_name import name_problem
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, BaseWeights
from loraplex.memory.loramoe import LORAMOE
from loraplex.memory.meteora import METEORA
from loraplex.memory.mixlora import MIXLORA
from loraplex.memory.mola import MOLA
from loraplex.memory.peft_lora import outline_lora, read_lora
from loraplex.memory.tensor_file import TensorListing, list_tensor_file, read_stored_file, tensor_file_digest
from loraplex.memory.tokenwise import TOKENWISE

FAMILIES: Mapping[str, Family] = {
    "LORA": Family(read_lora, outline_lora),
    "MIXLORA": Family(MIXLORA.read, MIXLORA.outline),
    "MOLA": Family(MOLA.read, MOLA.outline),
    "LORAMOE": Family(LORAMOE.read, LORAMOE.outline),
    "TOKENWISE": Family(TOKENWISE.read, TOKENWISE.outline),
    "METEORA": Family(METEORA.read, METEORA.outline),
}
"""Families that are served, by ``peft_type``."""

_ROUTED_FAMILIES = {"mixtral": "MIXLORA", "switch": "MIXLORA", "mola": "MOLA", "loramoe": "LORAMOE"}
"""By ``routing_strategy``, where there is no ``peft_type``; besides, what starts with mixlora is MixLoRA."""


def read_adapter(
    path: Path | str,
    shape: BaseShape,
    *,
    allow_bin: bool = False,
    max_bytes: int | None = None,
    base_name: str | tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    base_weights: BaseWeights | None = None,
    blueprints: Blueprints | None = None,
) -> AdapterSpec:
    """Read an adapter folder and make every check.

    Args:
        path: the folder.
        shape: what the served base offers to adapters.
        allow_bin: whether pickled weights may be read where there is no safetensors file.
        max_bytes: largest tensors' file that is read.
        base_name: name of the served base, or all its names; an adapter that names another gets a warning.
        dtype: of the served model; values beyond its range are refused. None: any finite value will do.
        base_weights: of the served base. DoRA and token-wise routing follow from them; and PEFT saves copies of
            ``embed_tokens`` and ``lm_head`` beside LoRA on them, which are compared with these. None: refused.
        blueprints: of adapters that were read with the same ``shape``, ``base_name``, ``dtype`` and ``base_weights``.

    Errors: AdapterFileError naming the key or file at fault, and what was expected.
    """
    folder = _folder(path)
    config = read_config_file(folder)
    raw = parse_config(config)
    family = _family(raw)
    stored = read_stored_file(folder, allow_bin=allow_bin, max_bytes=max_bytes)
    known = None if blueprints is None else blueprints.read(config, stored, dtype)
    if known is not None:
        return known
    file = stored.unpack()
    spec = family.read(raw, file, shape=shape, dtype=dtype, base_weights=base_weights)
    spec = replace(spec, warnings=(*_other_base(raw, base_name), *spec.warnings))
    if blueprints is None:
        return spec
    return blueprints.learn(config, stored, file, spec, partial(family.outline, raw))


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What a folder says of itself without its weights being read.

    Attributes:
        kind: as in ``AdapterSpec``.
        rank: the largest of any pair.
        targets: adapted sites in image order.
        num_tensors: in the tensors' file; None for a ``.bin``, which does not tell.
        num_bytes: size of the tensors' file.
        base_model: what it was trained on, as its configuration says.
        dtype: of the tensors, "mixed", or None for a ``.bin``.
        file: name of the tensors' file.
        num_experts, top_k, routing, scope, invocation: as in ``Outline``.
    """

    kind: str
    rank: int
    targets: tuple[str, ...]
    num_tensors: int | None
    num_bytes: int
    base_model: str | None
    dtype: str | None
    file: str
    num_experts: int = 0
    top_k: int = 0
    routing: str = ""
    scope: str | None = None
    invocation: tuple[int, ...] = ()


def describe_adapter(path: Path | str) -> AdapterSummary:
    """Describe an adapter folder from its configuration and the header of its tensors' file.

    Errors: AdapterFileError where that suffices to see that the adapter cannot be served.
    """
    raw, outline, listing = _outline(_folder(path))
    return AdapterSummary(
        kind=outline.kind,
        rank=outline.rank,
        targets=outline.targets,
        num_tensors=None if listing.shapes is None else len(listing.shapes),
        num_bytes=listing.num_bytes,
        base_model=text_or_none(raw, "base_model_name_or_path"),
        dtype=listing.dtype,
        file=listing.name,
        num_experts=outline.num_experts,
        top_k=outline.top_k,
        routing=outline.routing,
        scope=outline.scope,
        invocation=outline.invocation,
    )


def identity_of(path: Path | str, *, allow_bin: bool = False) -> str:
    """The identity that ``read_adapter`` gives, without a base: the file is hashed and not checked.

    Errors: AdapterFileError as of ``describe_adapter``, and for a ``.bin`` that is not allowed.
    """
    folder = _folder(path)
    _, outline, _ = _outline(folder)
    return adapter_identity(outline.kind, tensor_file_digest(folder, allow_bin=allow_bin), outline.settings)


def _outline(folder: Path) -> tuple[RawConfig, Outline, TensorListing]:
    raw = read_config(folder)
    family = _family(raw)
    listing = list_tensor_file(folder)
    return raw, family.outline(raw, listing), listing


@dataclass(frozen=True, slots=True)
class FoundAdapters:
    """Adapter folders by name, in the order of their names, and a sentence for each folder that was left out."""

    paths: Mapping[str, Path]
    warnings: tuple[str, ...]


def find_adapters(root: Path | str) -> FoundAdapters:
    """Every direct sub-folder of ``root`` that holds a configuration, or ``root`` alone if it does. Reads no file.

    Errors: AdapterFileError if ``root`` is no folder.
    """
    folder = _folder(root)
    if _is_adapter(folder):
        found = [folder.resolve()]
    else:
        try:
            with os.scandir(folder) as entries:
                found = sorted(Path(entry.path) for entry in entries if _is_adapter(Path(entry.path)))
        except OSError as error:
            raise AdapterFileError(f"{shown(str(root))}: cannot be listed: {error.strerror}") from error
    problems = {path: name_problem(path.name) for path in found}
    return FoundAdapters(
        paths={path.name: path for path, problem in problems.items() if problem is None},
        warnings=tuple(f"{shown(path.name)}: skipped: {problem}" for path, problem in problems.items() if problem),
    )


def _is_adapter(folder: Path) -> bool:
    try:
        return (folder / CONFIG_NAME).is_file()
    except OSError:
        return False


def _folder(path: Path | str) -> Path:
    try:
        folder = Path(path)
        if folder.is_dir():
            return folder
        sentence = "not a folder" if folder.exists() else "no such folder"
    except (OSError, ValueError) as error:
        sentence = f"not a path: {shown(str(error))}"
    raise AdapterFileError(f"{shown(str(path))}: {sentence}; expected one with {CONFIG_NAME}", key=str(path))


def _family(raw: RawConfig) -> Family:
    name = text_or_none(raw, "peft_type")
    key = "peft_type"
    if name is None:
        key, name = "routing_strategy", _routed_family(text_or_none(raw, "routing_strategy"))
    if name in FAMILIES:
        return FAMILIES[name]
    raise AdapterFileError(
        f"{key} in {CONFIG_NAME}: {shown(name)} is not served; expected {', '.join(FAMILIES)}", key=key
    )


def _routed_family(strategy: str | None) -> str:
    if strategy is None:
        return "LORA"
    return "MIXLORA" if strategy.startswith("mixlora") else _ROUTED_FAMILIES.get(strategy, strategy)


def _other_base(raw: RawConfig, base_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    named = text_or_none(raw, "base_model_name_or_path")
    names = (base_name,) if isinstance(base_name, str) else base_name
    if not named or not names or Path(named).name in {Path(name).name for name in names}:
        return ()
    return (f"base_model_name_or_path is {shown(named)}, but the served base is {shown(names[0])}",)
