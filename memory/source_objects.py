"""Adapters in object stores: Amazon S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

Credentials, regions and endpoints come from the environment, as the store's own tools read it (``AWS_ENDPOINT_URL``,
``AWS_WEB_IDENTITY_TOKEN_FILE``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME``). Permission to read
objects is enough; nothing is listed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.source_files import choose_files
from loraplex.memory.source_remote import RemoteFile, RemoteListing

try:
    import obstore
    import obstore.exceptions
    import obstore.store
except ImportError:
    HAS_OBSTORE = False
else:
    HAS_OBSTORE = True

_CHUNK_BYTES = 4 << 20
_MAX_STORES = 32
_LONGEST_DOWNLOAD = timedelta(days=1)  # a download that moves is never cut off; one that stalls is
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_STATUS = re.compile(r"status code: (\d{3})")
_PASSING_STATUS = (408, 425, 429)


class ObjectStoreRemote:
    """Reads from buckets; one client for each bucket, made when it is first wanted.

    Args:
        allow_bin: as in ``choose_files``.
        timeout_seconds: a connection, or a read that receives nothing, fails after this long.
    """

    def __init__(self, *, allow_bin: bool = False, timeout_seconds: float = 30.0) -> None:
        self._allow_bin = allow_bin
        self._timeout = timedelta(seconds=timeout_seconds)
        self._stores: dict[tuple[str, str], obstore.store.ObjectStore] = {}
        self._lock = threading.Lock()

    def list_files(self, source: AdapterSource) -> RemoteListing:
        store = self._store(source)
        return RemoteListing(choose_files(lambda name: _find(store, source, name), source, allow_bin=self._allow_bin))

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        store = self._store(source)
        for file in listing.files:
            with (folder / file.name).open("wb") as target:
                for chunk in _content(store, source, file):
                    target.write(chunk)

    def _store(self, source: AdapterSource) -> obstore.store.ObjectStore:
        if not HAS_OBSTORE:
            raise AdapterFileError(f"{source.url}: object stores need 'pip install loraplex[remote]'", key="path")
        key = (source.scheme, source.bucket)
        with self._lock:
            if key not in self._stores:
                if len(self._stores) >= _MAX_STORES:
                    self._stores.clear()
                self._stores[key] = self._made(source)
            return self._stores[key]

    def _made(self, source: AdapterSource) -> obstore.store.ObjectStore:
        """A client; nothing is asked of the store yet, so what fails is in the environment."""
        try:
            return self._make(source)
        except (obstore.exceptions.BaseError, OSError, ValueError):
            message = f"{source.url}: settings of this store in the environment are wrong or incomplete"
            raise AdapterFileError(message, key="path") from None

    def _make(self, source: AdapterSource) -> obstore.store.ObjectStore:
        # Plain HTTP happens only where the operator's own environment names such an endpoint.
        client: obstore.store.ClientConfig = {
            "allow_http": True,
            "connect_timeout": self._timeout,
            "read_timeout": self._timeout,
            "timeout": _LONGEST_DOWNLOAD,
        }
        options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
        if source.scheme == "s3":
            return obstore.store.S3Store(source.bucket, **options)
        if source.scheme == "gs":
            return obstore.store.GCSStore(source.bucket, **options)
        return obstore.store.AzureStore(source.bucket, **options)


def _key(source: AdapterSource, name: str) -> str:
    return f"{source.prefix}/{name}" if source.prefix else name


def _find(store: obstore.store.ObjectStore, source: AdapterSource, name: str) -> RemoteFile | None:
    try:
        with _faults(source, name):
            found = obstore.head(store, _key(source, name))
    except FileNotFoundError:
        return None
    # Some gateways give no entity tag.
    return RemoteFile(name, found["size"], found["e_tag"] or found["last_modified"].isoformat())


def _content(store: obstore.store.ObjectStore, source: AdapterSource, file: RemoteFile) -> Iterator[bytes]:
    """The bytes of a file, in chunks: exactly those that were listed."""
    left = file.size
    chunks = _chunks(store, source, file)
    while (chunk := _next(chunks, source, file)) is not None:
        left -= len(chunk)
        if left < 0:
            raise TransientReadError(f"{source.url}: {file.name} grew while it was being read", key=file.name)
        yield chunk
    if left:
        raise TransientReadError(f"{source.url}: {file.name} ended {left} bytes early", key=file.name)


def _chunks(store: obstore.store.ObjectStore, source: AdapterSource, file: RemoteFile) -> Iterator[bytes]:
    # Only strong entity tags can be matched; a weak one or a last modification cannot.
    options: Any = {"if_match": file.tag} if file.tag.startswith('"') else None
    result = obstore.get(store, _key(source, file.name), options=options)
    for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
        yield bytes(chunk)


def _next(chunks: Iterator[bytes], source: AdapterSource, file: RemoteFile) -> bytes | None:
    """The next chunk; here and not around the writes, so that a full disk is not taken for the remote's fault."""
    try:
        with _faults(source, file.name):
            return next(chunks, None)
    except FileNotFoundError:
        raise TransientReadError(f"{source.url}: {file.name} went away meanwhile", key=file.name) from None


@contextmanager
def _faults(source: AdapterSource, name: str) -> Iterator[None]:
    """Errors of a store as ours. Their texts are dropped: they hold signed URLs and parts of credentials."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError):
        raise AdapterFileError(f"{source.url}: access to {name} was denied", key=name) from None
    except obstore.exceptions.PreconditionError:
        raise TransientReadError(f"{source.url}: {name} changed while it was being read", key=name) from None
    except (obstore.exceptions.BaseError, OSError, ValueError, RuntimeError) as error:
        raise _translated(source, name, error) from None


def _translated(source: AdapterSource, name: str, error: Exception) -> AdapterFileError:
    text = str(error)
    message = f"{source.url}: {name} cannot be read: {_reason(text)}"
    status = _STATUS.search(text)
    refused = status is not None and status[1].startswith(("3", "4")) and int(status[1]) not in _PASSING_STATUS
    # A machine that has no identity to give may have one in a moment; its status is not the store's.
    if refused and not _is_about_credentials(text):
        return AdapterFileError(message, key=name)
    return TransientReadError(message, key=name)


def _is_about_credentials(text: str) -> bool:
    return "169.254.169.254" in text or "metadata.google" in text


def _reason(text: str) -> str:
    if _is_about_credentials(text):
        return "no credentials in the environment, and no machine identity to take them from"
    status = _STATUS.search(text)
    if status is not None:
        return f"the store answered with status {status[1]}"
    kind = _KIND.search(text)
    return {
        "Connect": "no connection to the store",
        "Timeout": "the store did not answer in time",
        "Interrupted": "the store's answer broke off",
    }.get(kind[1] if kind else "", "the store's answer could not be read")
