"""Finds a checkpoint's folder and reads its configuration."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from loraplex.server.errors import InvalidRequestError

_PATH_STARTS = ("/", "./", "../", "~")
"""What begins so is no hub id."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class CheckpointError(InvalidRequestError):
    """The checkpoint folder is incomplete or does not fit its configuration; the message names the file or tensor."""

    default_code = "invalid_checkpoint"


def find_checkpoint(model: str) -> Path:
    """The folder of a checkpoint: a local one, or a hub id's snapshot, fetched where there is a network.

    Raises:
        CheckpointError: neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith(_PATH_STARTS):
        raise CheckpointError(f"model {model!r}: no such folder", param="model")
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model {model!r} is neither a folder nor a model that the hub could give: {type(error).__name__}",
            param="model",
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """The transformers configuration of a checkpoint folder; CheckpointError where it has none or a broken one."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json", param="model")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}", param="model") from error
