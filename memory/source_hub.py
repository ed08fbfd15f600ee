"""Adapters on the Hugging Face hub. Token, endpoint and offline mode come from the environment, as for its client."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loraplex.memory.adapter_errors import AdapterFileError, TransientReadError
from loraplex.memory.adapter_source import AdapterSource
from loraplex.memory.disk_faults import is_local_fault
from loraplex.memory.source_files import choose_files
from loraplex.memory.source_remote import RemoteFile, RemoteListing

_PASSING_STATUS = (408, 425, 429)


class HubApi(Protocol):
    """The one call of the hub's client that describes a repository."""

    def model_info(self, repo_id: str, *, revision: str | None, timeout: float, files_metadata: bool) -> Any: ...


class HubRemote:
    """Reads from repositories on the hub.

    Args:
        allow_bin: as in ``choose_files``.
        timeout_seconds: to wait for an answer.
        api, fetch: in place of the hub's client; for tests.
    """

    def __init__(
        self,
        *,
        allow_bin: bool = False,
        timeout_seconds: float = 30.0,
        api: HubApi | None = None,
        fetch: Callable[..., object] = hf_hub_download,
    ) -> None:
        self._allow_bin, self._timeout_seconds = allow_bin, timeout_seconds
        self._api: HubApi = HfApi() if api is None else api
        self._fetch = fetch

    def list_files(self, source: AdapterSource) -> RemoteListing:
        with _faults(source):
            info = self._api.model_info(
                source.place, revision=source.revision, timeout=self._timeout_seconds, files_metadata=True
            )
        files = {file.name: file for file in map(_remote_file, info.siblings or ()) if file is not None}
        return RemoteListing(choose_files(files.get, source, allow_bin=self._allow_bin), str(info.sha))

    def download(self, source: AdapterSource, listing: RemoteListing, folder: Path) -> None:
        for file in listing.files:
            with _faults(source):
                self._fetch(
                    source.place,
                    file.name,
                    revision=listing.commit,
                    local_dir=folder,
                    etag_timeout=self._timeout_seconds,
                )
        # The client's notes about what it fetched.
        shutil.rmtree(folder / ".cache", ignore_errors=True)


def _remote_file(sibling: Any) -> RemoteFile | None:
    """A file of a repository by the hash of its content; None for one whose size the hub does not tell."""
    if sibling.size is None:
        return None
    lfs = sibling.lfs
    return RemoteFile(sibling.rfilename, int(sibling.size), str(lfs.sha256 if lfs is not None else sibling.blob_id))


@contextmanager
def _faults(source: AdapterSource) -> Iterator[None]:
    """Errors of the hub's client as ours. Their texts are dropped: they may hold signed URLs."""
    try:
        yield
    except OfflineModeIsEnabled:
        # What is on disk is served, as while the hub cannot be reached for any other reason.
        raise TransientReadError(
            f"{source.url}: the hub is not asked while HF_HUB_OFFLINE is set; give a local folder, or unset it"
        ) from None
    except (GatedRepoError, DisabledRepoError):
        raise AdapterFileError(f"{source.url}: gated or disabled; HF_TOKEN must belong to who may read it") from None
    except RevisionNotFoundError:
        raise AdapterFileError(f"{source.url}: no such revision on the hub") from None
    except (RepositoryNotFoundError, RemoteEntryNotFoundError, HFValidationError):
        raise AdapterFileError(f"{source.url}: not on the hub, or private and HF_TOKEN may not read it") from None
    except HfHubHTTPError as error:
        raise _by_status(source, getattr(error.response, "status_code", None)) from None
    except OSError as error:
        if is_local_fault(error):
            raise
        raise TransientReadError(f"{source.url}: cannot be read from the hub: {type(error).__name__}") from None
    except Exception as error:
        # The client's own transport, whichever it is, raises what derives from nothing more telling.
        raise TransientReadError(f"{source.url}: cannot be read from the hub: {type(error).__name__}") from None


def _by_status(source: AdapterSource, status: int | None) -> AdapterFileError:
    message = f"{source.url}: the hub answered with status {status}"
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
        return AdapterFileError(message)
    return TransientReadError(message)
