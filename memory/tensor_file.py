"""The tensors' file of an adapter folder, read once: what is hashed is what is checked is what is served."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import safe_open

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError, may_pass, shown
from loraplex.memory.file_hash import FileHash
from loraplex.memory.safetensors_header import unpack_safetensors

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
BIN_MAX_BYTES = 2 << 30
"""Most that a ``.bin`` may hold once unpacked, whatever the caller allows."""

_CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous() for k, v in t.items()}, 'adapter_model.safetensors')\""
)
_READ_BYTES = 1 << 20  # at once; hashed while the next are read
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Everything in a tensors' file.

    Attributes:
        name: of the file within its folder.
        tensors: by key, on the host, as stored; views of the file's bytes.
        hashing: of those bytes; may be under way.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    hashing: FileHash

    @property
    def digest(self) -> bytes:
        """SHA-256 over the file's bytes."""
        return self.hashing.digest()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A tensors' file as it stands.

    Attributes:
        name: of the file within its folder.
        data: its bytes, [n] uint8.
        hashing: of those bytes; may be under way.
    """

    name: str
    data: torch.Tensor
    hashing: FileHash

    def unpack(self) -> TensorFile:
        """Its tensors; AdapterFileError where it is corrupt."""
        if self.name == BIN_NAME:
            return TensorFile(self.name, _unpack_bin(self.data.numpy().tobytes()), self.hashing)
        return TensorFile(self.name, _unpack_safetensors(self.data), self.hashing)


@dataclass(frozen=True, slots=True)
class TensorListing:
    """What a tensors' file says of itself without its weights being read.

    Attributes:
        name: of the file within its folder.
        num_bytes: size of the file.
        shapes: by key; None for a ``.bin``, which does not tell.
        dtype: as torch names it, "mixed", or None for a ``.bin``.
    """

    name: str
    num_bytes: int
    shapes: Mapping[str, tuple[int, ...]] | None
    dtype: str | None


def read_regular_file(folder: Path, name: str, max_bytes: int | None) -> bytes:
    """The bytes of a file; AdapterFileError if it is absent, no regular file, too large, or changes meanwhile.

    TransientReadError where another try may succeed.
    """
    with _opened(folder, name, max_bytes) as (file, size):
        data = file.read(size)
        _check_size(name, len(data), size)
    return data


def _read_hashed(folder: Path, name: str, max_bytes: int | None) -> tuple[torch.Tensor, FileHash]:
    """The bytes of a file, [n] uint8, and their hash, which is taken while they are read; errors likewise."""
    with _opened(folder, name, max_bytes) as (file, size):
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy().data
        with FileHash(view) as hashing:
            done = 0
            while done < size and (count := file.readinto(view[done : done + _READ_BYTES])):
                done += count
                hashing.extend_to(done)
        _check_size(name, done, size)
    return data, hashing


@contextmanager
def _opened(folder: Path, name: str, max_bytes: int | None) -> Iterator[tuple[FileIO, int]]:
    """A file of accepted size, and that size."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            _check_regular(name, status, max_bytes)
            yield file, status.st_size
    except (OSError, ValueError) as error:
        kind = TransientReadError if may_pass(error) else AdapterFileError
        raise kind(f"{name}: cannot be read: {_reason(error)}", key=name) from error


def _check_size(name: str, read: int, expected: int) -> None:
    if read != expected:
        raise TransientReadError(f"{name}: changed while it was being read", key=name)


def _check_regular(name: str, status: os.stat_result, max_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFileError(f"{name}: expected a regular file", key=name)
    if max_bytes is not None and status.st_size > max_bytes:
        raise AdapterFileError(f"{name}: {status.st_size} bytes; at most {max_bytes} are accepted", key=name)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else shown(str(error))


def tensor_file_name(folder: Path, *, allow_bin: bool) -> str:
    """Which tensors' file of a folder to read; AdapterFileError where there is none that may be read."""
    if (folder / SAFETENSORS_NAME).exists():
        return SAFETENSORS_NAME
    if not (folder / BIN_NAME).exists():
        raise AdapterFileError(f"{SAFETENSORS_NAME}: no such file in the adapter's folder", key=SAFETENSORS_NAME)
    if not allow_bin:
        raise AdapterFileError(
            f"{BIN_NAME}: pickled weights are not read; convert them inside the folder with: {_CONVERSION}",
            key=BIN_NAME,
        )
    return BIN_NAME


def read_stored_file(folder: Path, *, allow_bin: bool, max_bytes: int | None) -> StoredFile:
    """Read and hash the tensors' file of an adapter folder.

    Errors: AdapterFileError for a file that is absent, too large, or a ``.bin`` that is not allowed.
    """
    name = tensor_file_name(folder, allow_bin=allow_bin)
    if name == BIN_NAME:
        max_bytes = min(max_bytes or BIN_MAX_BYTES, BIN_MAX_BYTES)
    data, hashing = _read_hashed(folder, name, max_bytes)
    return StoredFile(name, data, hashing)


def read_tensor_file(folder: Path, *, allow_bin: bool, max_bytes: int | None) -> TensorFile:
    """Read, hash and unpack the tensors of an adapter folder.

    Errors: AdapterFileError for a file that is absent, corrupt, too large, or a ``.bin`` that is not allowed.
    """
    return read_stored_file(folder, allow_bin=allow_bin, max_bytes=max_bytes).unpack()


def tensor_file_digest(folder: Path, *, allow_bin: bool) -> bytes:
    """SHA-256 over the bytes of the tensors' file, as in ``TensorFile``, without unpacking it; errors likewise."""
    name = tensor_file_name(folder, allow_bin=allow_bin)
    try:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise AdapterFileError(f"{name}: cannot be read: {_reason(error)}", key=name) from error


def _unpack_safetensors(data: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return unpack_safetensors(data)
    except (ValueError, RuntimeError) as error:
        raise _corrupt(SAFETENSORS_NAME, error) from error


def _unpack_bin(data: bytes) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > BIN_MAX_BYTES:
            raise ValueError(f"it unpacks to {unpacked} bytes; at most {BIN_MAX_BYTES} are accepted")
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _corrupt(BIN_NAME, error) from error
    if not isinstance(loaded, dict):
        raise AdapterFileError(f"{BIN_NAME}: expected a dictionary of tensors", key=BIN_NAME)
    return {_text(key): _plain(key, value) for key, value in loaded.items()}


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise AdapterFileError(f"{BIN_NAME}: the key {shown(key)} is not a string", key=BIN_NAME)
    return key


def _plain(key: object, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise AdapterFileError(f"{shown(key)}: expected a dense tensor in {BIN_NAME}", key=str(key))
    return value.detach()


def _corrupt(name: str, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{name}: corrupt or truncated: {shown(str(error))}", key=name)


def list_tensor_file(folder: Path) -> TensorListing:
    """Keys and shapes of a folder's tensors, from the header alone.

    Errors: AdapterFileError for a file that is absent or whose header is corrupt.
    """
    name = tensor_file_name(folder, allow_bin=True)
    try:
        status = (folder / name).stat()
        _check_regular(name, status, None)
        if name == BIN_NAME:
            return TensorListing(name, status.st_size, None, None)
        with safe_open(folder / name, "pt") as header:
            slices = {key: header.get_slice(key) for key in header.keys()}  # noqa: SIM118 (no iterator of its own)
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {part.get_dtype() for part in slices.values()}
    except AdapterFileError:
        raise
    except Exception as error:
        raise _corrupt(name, error) from error
    return TensorListing(name, status.st_size, shapes, _dtype_name(dtypes))


def _dtype_name(dtypes: set[str]) -> str:
    only = next(iter(dtypes), "mixed") if len(dtypes) <= 1 else "mixed"
    return _DTYPE_NAMES.get(only, only.lower())
