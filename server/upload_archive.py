"""Takes an adapter's files out of an archive that somebody has sent: nothing else, nowhere else, and not too much."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from loraplex.memory.adapter_config import CONFIG_NAME
from loraplex.memory.tensor_file import BIN_NAME, SAFETENSORS_NAME
from loraplex.server.errors import InvalidRequestError, PayloadTooLargeError

FILE_NAMES = (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)
"""What an adapter's folder consists of; other files of an archive are passed over."""

MAX_MEMBERS = 1000
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_HEADER_BYTES = 64 << 10
_LONG_NUMBER = re.compile(rb"\d{65}")
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RecursionError,
    ValueError,
)
"""What damage makes the readers of archives raise. OSErrors of reading are told from those of writing before."""


def unpack_adapter(archive: Path, folder: Path, limit: int) -> None:
    """Writes the adapter of a .tar, .tar.gz or .zip into a folder; it may lie in a folder of the archive's own.

    Args:
        limit: the most bytes, unpacked, of all members.

    Raises:
        InvalidRequestError: it is no such archive, or holds links, odd paths or a file twice.
        PayloadTooLargeError: it holds more than the limit.
        OSError: the files cannot be written.
    """
    unpacking = _Unpacking(folder, limit)
    try:
        if zipfile.is_zipfile(archive):
            _read_zip(archive, unpacking)
        else:
            _read_tar(archive, unpacking)
    except _BROKEN as error:
        raise _refused(f"is no archive that can be read: {type(error).__name__}") from error


class _Unpacking:
    """One archive on its way into a folder."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._bytes = self._members = 0
        self._parents: set[PurePosixPath] = set()

    def member(self, name: str, size: int, open_member: Callable[[], AbstractContextManager[IO[bytes]]]) -> None:
        """The next regular file of the archive."""
        self.count(size)
        path = _checked(name)
        if path.name not in FILE_NAMES:
            return
        self._parents.add(path.parent)
        if len(path.parts) > 2 or len(self._parents) > 1:
            raise _refused("must hold one adapter, at its top or in one folder")
        with open_member() as source, self._create(path.name) as target:
            left = size
            while chunk := source.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise _refused(f"lies about the size of {path.name}")
                target.write(chunk)

    def count(self, size: int) -> None:
        """Any member, whether it is taken or not: what is passed over must be unpacked, too."""
        if size < 0:
            raise _refused("holds a file of less than no bytes")
        self._members += 1
        self._bytes += size
        if self._members > MAX_MEMBERS:
            raise _refused(f"holds more than {MAX_MEMBERS} files")
        if self._bytes > self._limit:
            raise PayloadTooLargeError(
                f"The archive holds more than {self._limit} bytes, the most that 'max_adapter_bytes' allows.",
                param="file",
            )

    def _create(self, name: str) -> IO[bytes]:
        try:
            return (self._folder / name).open("xb")
        except FileExistsError:
            raise _refused(f"holds {name} twice") from None


class _Pieces(io.RawIOBase):
    """A file that gives no large piece at once, as directories of archives are read whole, whatever size they claim.

    That it cannot be read is the archive's fault, so that an OSError is about the files which are written.
    """

    def __init__(self, file: gzip.GzipFile | io.BufferedReader) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        with _refusing():
            data = self._file.read(_CHUNK + 1 if size < 0 else min(size, _CHUNK + 1))
        if len(data) > _CHUNK:
            raise _refused("has a header that is too long")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        with _refusing():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _TarPieces(_Pieces):
    """Of a tar: its headers are bounded further, each and all those of one member together."""

    _is_unpacking = False
    _left = _CHUNK

    def read(self, size: int = -1) -> bytes:
        if self._is_unpacking:
            return super().read(size)
        self._left -= size
        if not 0 <= size <= _HEADER_BYTES or self._left < 0:
            raise _refused("has a header that is too long")
        data = super().read(size)
        # Patterns that look for a number take time with the square of its length, and let nothing else run meanwhile.
        if size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(data):
            raise _refused("has a header with a number that is too long")
        return data

    def next_member(self) -> None:
        """The headers of a member are over."""
        self._left = _CHUNK

    @contextlib.contextmanager
    def unpacking(self) -> Iterator[None]:
        """Around the reading of a member, which comes in larger pieces than headers do."""
        self._is_unpacking = True
        try:
            yield
        finally:
            self._is_unpacking = False


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refused(f"is no archive that can be read: {type(error).__name__}") from error


def _read_tar(archive: Path, unpacking: _Unpacking) -> None:
    with archive.open("rb") as plain:
        is_packed = plain.read(2) == _GZIP
        plain.seek(0)
        pieces = _TarPieces(gzip.GzipFile(fileobj=plain) if is_packed else plain)
        with tarfile.open(fileobj=pieces, mode="r:", errorlevel=2) as tar:
            for member in tar:
                pieces.next_member()
                if member.isdir():
                    unpacking.count(0)
                elif not member.isreg() or member.issparse():
                    raise _refused("may hold files and folders only, no links and no devices")
                else:
                    unpacking.member(member.name, member.size, partial(_extracted, tar, member, pieces))


@contextlib.contextmanager
def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo, pieces: _TarPieces) -> Iterator[IO[bytes]]:
    found = tar.extractfile(member)
    assert found is not None, "regular files can be extracted"
    with pieces.unpacking(), found:
        yield found


def _read_zip(archive: Path, unpacking: _Unpacking) -> None:
    with archive.open("rb") as plain, zipfile.ZipFile(_Pieces(plain)) as packed:
        for member in packed.infolist():
            mode = member.external_attr >> 16
            if member.is_dir():
                unpacking.count(0)
            elif member.flag_bits & 1:
                raise _refused("is encrypted")
            elif member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise _refused("is packed in a way that is not known; a .zip may store or deflate")
            elif stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
                raise _refused("may hold files and folders only, no links and no devices")
            else:
                unpacking.member(member.filename, member.file_size, partial(packed.open, member))


def _checked(name: str) -> PurePosixPath:
    path = PurePosixPath(name.removeprefix("./"))
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
        raise _refused(f"holds a path that leads out of it: {name[:80]!r}")
    return path


def _refused(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"'file' {what}; accepted is a .tar, .tar.gz or .zip of an adapter.", param="file")
