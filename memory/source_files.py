"""Which files of a remote adapter are fetched."""

from __future__ import annotations

from collections.abc import Callable

from loraplex.memory.adapter_config import CONFIG_MAX_BYTES, CONFIG_NAME
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.source_remote import RemoteFile
from loraplex.memory.tensor_file import BIN_NAME, SAFETENSORS_NAME


def choose_files(
    find: Callable[[str], RemoteFile | None], source: AdapterSource, *, allow_bin: bool
) -> tuple[RemoteFile, ...]:
    """The files that readers of adapters open: the configuration, and the tensors' file.

    Args:
        find: a file by its name; None where there is none.
        source: where, for messages.
        allow_bin: whether pickled weights may be read where there is no safetensors file.

    Errors: AdapterFileError naming what is absent.
    """
    config = find(CONFIG_NAME)
    if config is None:
        raise AdapterFileError(f"{source.url}: no adapter here; expected {CONFIG_NAME}", key=CONFIG_NAME)
    if config.size > CONFIG_MAX_BYTES:
        raise AdapterFileError(f"{CONFIG_NAME}: {config.size} bytes; at most {CONFIG_MAX_BYTES}", key=CONFIG_NAME)
    tensors = find(SAFETENSORS_NAME)
    if tensors is not None:
        return config, tensors
    pickled = find(BIN_NAME)
    if pickled is None:
        raise AdapterFileError(f"{source.url}: no {SAFETENSORS_NAME} here", key=SAFETENSORS_NAME)
    if not allow_bin:
        raise AdapterFileError(
            f"{source.url}: only {BIN_NAME}; pickled weights are not read; expected {SAFETENSORS_NAME}", key=BIN_NAME
        )
    return config, pickled
