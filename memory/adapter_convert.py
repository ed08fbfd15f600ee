"""Converted adapters: what a folder is to hold, written whole or not at all; and the conversion that only renames."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex.memory.adapter_config import CONFIG_NAME, RawConfig, read_config, text_or_none
from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.mixlora import MIXLORA
from loraplex.memory.tensor_file import SAFETENSORS_NAME, read_tensor_file

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755

_MIXLORA_STRATEGIES = {"mixtral": "mixlora", "switch": "mixlora-switch"}


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """What an adapter folder is to hold.

    Attributes:
        config: for ``adapter_config.json``.
        tensors: for ``adapter_model.safetensors``.
        warnings: what the operator should know of the conversion.
    """

    config: RawConfig
    tensors: Mapping[str, torch.Tensor]
    warnings: tuple[str, ...] = ()


def write_adapter(
    content: AdapterContent, folder: Path, *, replace: bool = False, check: Callable[[Path], object]
) -> None:
    """Write an adapter folder: the whole of it appears at once, after ``check`` has read it.

    Args:
        folder: where; the folder that it stands in exists.
        replace: whether an adapter that is there already is replaced. Nothing else ever is.
        check: given the folder before it gets its name; what it raises leaves everything as it was.

    Errors: AdapterFileError if something is there that must not be replaced, or the folder cannot be written.
    """
    _check_free(folder, replace)
    try:
        with tempfile.TemporaryDirectory(prefix=".converted-", dir=folder.absolute().parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            _fill(new, content)
            check(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except OSError as error:
        raise AdapterFileError(f"{shown(str(folder))}: cannot be written: {error.strerror}", key=str(folder)) from error


def _check_free(folder: Path, replace: bool) -> None:
    name = shown(str(folder))
    if not os.path.lexists(folder):
        return
    if not replace:
        raise AdapterFileError(
            f"{name}: exists already; expected a new folder, or leave to replace it (--force)", key=str(folder)
        )
    if folder.is_symlink() or not folder.is_dir() or not (_is_empty(folder) or (folder / CONFIG_NAME).is_file()):
        raise AdapterFileError(f"{name}: not an adapter's folder, so it is not replaced", key=str(folder))


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _fill(folder: Path, content: AdapterContent) -> None:
    folder.mkdir()
    folder.chmod(_FOLDER_MODE)
    (folder / CONFIG_NAME).write_text(json.dumps(content.config, indent=2, allow_nan=False) + "\n")
    # Copies: tensors that share memory, as views of one file may, are refused by the format.
    copies = {
        key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in content.tensors.items()
    }
    save_file(copies, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
    for name in (CONFIG_NAME, SAFETENSORS_NAME):
        (folder / name).chmod(_FILE_MODE)


def in_modern_form(path: Path, *, allow_bin: bool = False) -> AdapterContent:
    """An adapter as safetensors, and MixLoRA in the naming that its package writes today.

    Every weight stays as it is. Keys of another form than the published ones stay, too; a reader then names them.

    Errors: AdapterFileError for a folder that cannot be read, or a tensor that is there in two namings.
    """
    config = read_config(path)
    file = read_tensor_file(path, allow_bin=allow_bin, max_bytes=None)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in file.tensors.items():
        modern = _modern_key(key)
        if modern in tensors:
            raise AdapterFileError(f"{shown(key)}: a second tensor for {shown(modern)}; expected one naming", key=key)
        tensors[modern] = tensor
    if any(key.startswith("mixlora.") for key in tensors):
        config = _modern_config(config)
    return AdapterContent(config, tensors)


def _modern_key(key: str) -> str:
    if router := MIXLORA.router_of(key):
        return MIXLORA.router_key(router)
    stem, half, end = key.rpartition(".lora_")
    place = MIXLORA.place_of(stem)
    if place is None or place.expert is None:
        return key
    return f"mixlora.layers.{place.layer}.mlp.{place.site}.experts.{place.expert}{half}{end}"


def _modern_config(config: RawConfig) -> RawConfig:
    strategy = text_or_none(config, "routing_strategy")
    if strategy is None:
        return config
    return {"peft_type": "MIXLORA", **config, "routing_strategy": _MIXLORA_STRATEGIES.get(strategy, strategy)}
