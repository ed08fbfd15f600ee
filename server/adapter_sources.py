"""Where adapters may come from when a request names the place: folders below roots, and allowed remote sources."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_source import allowed_sources, parse_source, resolve_source, source_problem
from loraplex.server.adapter_registry import check_path
from loraplex.server.errors import InvalidRequestError


class SourceRules:
    """What may be registered over HTTP.

    Args:
        roots: folders below which local paths must lie; none means any folder.
        prefixes: beginnings of the addresses of remote sources; none means no remote source.

    Raises:
        AdapterFileError: a prefix is none.
    """

    def __init__(self, roots: Sequence[Path] = (), prefixes: Sequence[str] = ()) -> None:
        self._roots = tuple(root.resolve() for root in roots)
        self._prefixes = allowed_sources(prefixes)

    async def checked(self, path: str, param: str) -> str:
        """The path to register: an existing folder without links in its path, or the address of an allowed source.

        Raises:
            InvalidRequestError: it is neither.
        """
        check_path(path, param)
        return await asyncio.to_thread(self._checked, path, param)

    def allows(self, path: str) -> bool:
        """Whether a path that was registered earlier may still be."""
        return source_problem(path, self._roots, self._prefixes) is None

    def _checked(self, path: str, param: str) -> str:
        problem = source_problem(path, self._roots, self._prefixes)
        if problem is not None:
            raise InvalidRequestError(f"'{param}': {problem}.", param=param)
        source = resolve_source(path)
        if source.is_remote:
            return source.url
        folder = Path(source.place).resolve()
        if not _is_folder(folder):
            raise InvalidRequestError(f"'{param}' is no folder on the server: '{source.place}'.", param=param)
        return str(folder)


def source_kind(path: str) -> str:
    """The kind of a registered path: ``file`` for folders, else the scheme of its address."""
    try:
        return parse_source(path).scheme
    except AdapterFileError:
        return "file"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
