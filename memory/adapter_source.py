"""Where adapters come from: local folders, object stores and the Hugging Face hub. Imports no torch.

A source is a text: a folder, ``file:///folder``, ``s3://bucket/prefix`` (likewise ``gs://`` and ``az://``), or
``hf://org/name`` with an optional ``@revision``. What a text means never depends on its spelling: schemes are read
without regard to case, and everything that two parsers could read differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.merge_recipe import PREFIX as RECIPE_PREFIX

Scheme = Literal["file", "s3", "gs", "az", "hf"]

ACCEPTED = "a folder, file:///folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or hf://org/name"

_OBJECT_STORES: dict[str, Scheme] = {"s3": "s3", "gs": "gs", "az": "az"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,253}[A-Za-z0-9_])?")
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One place that an adapter is read from.

    Attributes:
        scheme: ``file`` for local folders.
        place: the folder as given, ``bucket/prefix``, or ``org/name``.
        revision: branch, tag or commit on the hub; None for its default branch.
    """

    scheme: Scheme
    place: str
    revision: str | None = None

    @property
    def is_remote(self) -> bool:
        return self.scheme != "file"

    @property
    def url(self) -> str:
        """The one text that stands for this source; a local folder's is its path. Holds no secret."""
        if not self.is_remote:
            return self.place
        return f"{self.scheme}://{self.place}" + (f"@{self.revision}" if self.revision else "")

    @property
    def bucket(self) -> str:
        """Bucket or container of an object store."""
        return self.place.partition("/")[0]

    @property
    def prefix(self) -> str:
        """What every key of the adapter begins with, without a slash at its end; may be empty."""
        return self.place.partition("/")[2]


def parse_source(path: str) -> AdapterSource:
    """What a registration's path stands for. Looks at the text alone: what has no scheme is a local folder.

    Errors: AdapterFileError saying what is accepted; it shows neither user names nor passwords nor queries.
    """
    if not path or "\0" in path:
        raise _refused(path, "no path")
    if path.startswith(RECIPE_PREFIX):
        raise _refused(path, "a recipe of a merged adapter is no single source")
    match = _URL.match(path)
    if match is None:
        return AdapterSource("file", path)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return _local(path, rest)
    if scheme == "hf":
        return _hub(path, rest)
    if scheme in _OBJECT_STORES:
        place = "/".join(_segments(path, rest))
        return AdapterSource(_OBJECT_STORES[scheme], place)
    raise _refused(path, "unknown scheme")


def resolve_source(path: str) -> AdapterSource:
    """As ``parse_source``, and ``org/name[@revision]`` is an id on the hub where there is no such folder.

    For the door only, where a person names an adapter: what is registered is the ``url``, so that a folder which
    disappears later is never taken for an id.
    """
    source = parse_source(path)
    if source.is_remote or not _is_hub_id(path) or _exists(path):
        return source
    return _hub(path, path)


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """Sources that are allowed: those of a scheme whose place begins with these segments.

    ``revision`` narrows a hub id to one revision; None allows all.
    """

    scheme: Scheme
    segments: tuple[str, ...]
    revision: str | None = None

    def covers(self, source: AdapterSource) -> bool:
        """Whether a source lies below; whole segments are compared, so ``s3://b/team`` does not cover ``s3://b/team2``."""
        here = source.scheme == self.scheme and self.revision in (None, source.revision)
        return here and tuple(source.place.split("/"))[: len(self.segments)] == self.segments


def allowed_sources(prefixes: Iterable[str]) -> tuple[SourcePrefix, ...]:
    """Parse an operator's list such as ``s3://my-bucket/adapters/``, ``hf://my-org/`` or ``hf://`` for all of the hub.

    Errors: AdapterFileError naming ``adapter_sources``.
    """
    return tuple(_allowed(prefix) for prefix in prefixes)


def source_problem(path: str, roots: Sequence[Path], prefixes: Sequence[SourcePrefix]) -> str | None:
    """What keeps a path that came over HTTP from being loaded; None if nothing does.

    Args:
        path: as the client wrote it.
        roots: folders below which local folders must lie, links followed; none means any folder.
        prefixes: remote sources that are allowed; none means no remote source at all, lest a client make the server
            send requests of the client's choosing.
    """
    try:
        source = resolve_source(path)
    except AdapterFileError as error:
        return error.message
    if source.is_remote:
        if any(prefix.covers(source) for prefix in prefixes):
            return None
        return f"{shown(source.url)}: this source is not allowed; the operator allows sources with adapter_sources"
    return _folder_problem(source.place, roots)


def _folder_problem(place: str, roots: Sequence[Path]) -> str | None:
    try:
        folder = Path(place).resolve()
        inside = not roots or any(folder.is_relative_to(root.resolve()) for root in roots)
    except (OSError, ValueError, RuntimeError):
        return f"{shown(place)}: not a path; expected {ACCEPTED}"
    return None if inside else f"{shown(place)}: not below one of the folders that the operator allows (adapter_roots)"


def _local(path: str, rest: str) -> AdapterSource:
    if not rest.startswith("/"):
        raise _refused(path, "a file URL names no host and an absolute folder")
    if "?" in rest or "#" in rest:
        raise _refused(path, "a file URL has no query and no fragment")
    try:
        folder = unquote(rest, errors="strict")
    except UnicodeDecodeError:
        raise _refused(path, "its escapes are not UTF-8") from None
    if "\0" in folder:
        raise _refused(path, "no path")
    # POSIX keeps two slashes at the start apart from one; a URL does not mean that.
    return AdapterSource("file", str(PurePosixPath("/" + folder.lstrip("/"))))


def _hub(path: str, rest: str) -> AdapterSource:
    place, at, revision = rest.partition("@")
    if at and not _is_revision(revision):
        raise _refused(path, "a revision is a branch, a tag or a commit")
    parts = place.removesuffix("/").split("/")
    if len(parts) != 2 or not all(_is_hub_part(part) for part in parts):
        raise _refused(path, "not the id of a repository on the hub")
    return AdapterSource("hf", "/".join(parts), revision if at else None)


def _is_hub_id(text: str) -> bool:
    place, at, revision = text.partition("@")
    parts = place.split("/")
    return len(parts) == 2 and all(_is_hub_part(part) for part in parts) and (not at or _is_revision(revision))


def _is_hub_part(part: str) -> bool:
    plain = "--" not in part and ".." not in part and not part.endswith(".git")
    return plain and _HUB_PART.fullmatch(part) is not None


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def _segments(path: str, rest: str) -> list[str]:
    """Bucket and parts of the prefix, where every reader of such texts agrees about them."""
    if "@" in rest.partition("/")[0]:
        raise _refused(path, "credentials come from the environment, never from the path")
    if not rest.isprintable() or any(character in rest for character in "%?#\\") or len(rest) > _LONGEST:
        raise _refused(path, f"at most {_LONGEST} printable characters, none of them %, ?, # or \\")
    bucket, *parts = rest.removesuffix("/").split("/")
    if _BUCKET.fullmatch(bucket) is None or ".." in bucket:
        raise _refused(path, "no name of a bucket")
    if any(part in ("", ".", "..") or part != part.strip() for part in parts):
        raise _refused(path, "a prefix has no empty parts, no . and no ..")
    return [bucket, *parts]


def _allowed(prefix: str) -> SourcePrefix:
    try:
        return _parse_prefix(prefix.strip())
    except AdapterFileError as error:
        raise AdapterFileError(
            f"adapter_sources: {error.message}; a prefix may end early, as s3://bucket, hf://org or hf:// do",
            key="adapter_sources",
        ) from None


def _parse_prefix(prefix: str) -> SourcePrefix:
    match = _URL.match(prefix)
    if match is None or match[1].lower() == "file":
        raise _refused(prefix, "no prefix of remote sources; adapter_roots allows local folders")
    scheme, rest = match[1].lower(), match[2].removesuffix("/")
    if not rest and scheme in (*_OBJECT_STORES, "hf"):
        return SourcePrefix(_OBJECT_STORES.get(scheme, "hf"), ())
    if scheme == "hf" and _is_hub_part(rest):
        return SourcePrefix("hf", (rest,))
    source = parse_source(prefix)
    return SourcePrefix(source.scheme, tuple(source.place.split("/")), source.revision)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return True


def _refused(path: str, reason: str) -> AdapterFileError:
    return AdapterFileError(f"{shown(_without_secrets(path))}: {reason}; expected {ACCEPTED}", key="path")


def _without_secrets(path: str) -> str:
    """A URL that was refused, without what may be a user's name, a password or a signature."""
    match = _URL.match(path)
    if match is None:
        return path
    rest = re.split(r"[?#]", match[2], maxsplit=1)[0]
    before, _, after = rest.rpartition("@")
    is_revision = match[1].lower() == "hf" and "/" in before and ":" not in before
    return f"{match[1]}://{rest if is_revision else after}"
