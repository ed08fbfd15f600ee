"""All remote sources behind one interface."""

from __future__ import annotations

from pathlib import Path

from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.source_hub import HubRemote
from loraplex.memory.source_objects import ObjectStoreRemote
from loraplex.memory.source_remote import Remote, RemoteListing


class Remotes:
    """Asks the hub or an object store, as a source says.

    Args:
        allow_bin: whether pickled weights are fetched where there is no safetensors file.
        timeout_seconds: a connection, or a read that receives nothing, fails after this long.
        objects, hub: in place of the standard ones; for tests.
    """

    def __init__(
        self,
        *,
        allow_bin: bool = False,
        timeout_seconds: float = 30.0,
        objects: Remote | None = None,
        hub: Remote | None = None,
    ) -> None:
        self._objects = objects or ObjectStoreRemote(allow_bin=allow_bin, timeout_seconds=timeout_seconds)
        self._hub = hub or HubRemote(allow_bin=allow_bin, timeout_seconds=timeout_seconds)

    def list_files(self, source: AdapterSource) -> RemoteListing:
        return self._of(source).list_files(source)

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        self._of(source).download(source, listing, folder)

    def _of(self, source: AdapterSource) -> Remote:
        return self._hub if source.scheme == "hf" else self._objects
