"""What a remote source offers: which files of an adapter it has now, and their bytes. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

from loraplex.memory.adapter_source import AdapterSource


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a remote adapter.

    Attributes:
        name: within the adapter's folder.
        size: bytes.
        tag: changes when the content does: an entity tag, or the hash of a blob.
    """

    name: str
    size: int
    tag: str


@dataclass(frozen=True, slots=True)
class RemoteListing:
    """The files of an adapter that matter, as they are at one moment.

    ``commit`` is what the hub calls that moment; empty elsewhere.
    """

    files: tuple[RemoteFile, ...]
    commit: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def version(self) -> str:
        """32 hexadecimal digits over the files that matter; a commit that changes none of them leaves it as it is."""
        text = json.dumps([astuple(file) for file in self.files])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Remote(Protocol):
    """Reads adapters from one kind of place. Used by several threads at once; tries nothing twice.

    Errors: TransientReadError for what may pass, AdapterFileError for what will not; OSError where the local folder
    cannot be written.
    """

    def list_files(self, source: AdapterSource) -> RemoteListing:
        """Ask which files there are; cheap, reads no content."""

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        """Write all files of a listing into a folder; never more bytes than it says."""
