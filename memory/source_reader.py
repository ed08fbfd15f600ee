"""From a registration's path to a description: folders, remote sources through the disk cache, and merges of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_merge import read_source
from loraplex.memory.adapter_source import parse_source
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.merge_recipe import PREFIX, MergeRecipe


class SourceReader:
    """Reads whatever a path names; used by several threads at once.

    Args:
        cache: where remote adapters are kept; None means that there are none.

    Attributes:
        expected: the content that a registration must have, by path and revision, where anybody knows it.
    """

    def __init__(self, cache: DiskCache | None = None) -> None:
        self._cache = cache
        self.expected: Callable[[str, int], str | None] | None = None

    def __call__(self, path: Path | str, shape: BaseShape, **options: Any) -> AdapterSpec:
        """Arguments and errors as in ``read_adapter``, TransientReadError for a remote's faults that may pass."""
        return read_source(path, shape, read=self._read, expected=self.expected, **options)

    @contextmanager
    def open(self, path: Path | str) -> Iterator[Path]:
        """The folder of one adapter, which stays until the context is left. No merges.

        Errors: AdapterFileError as of ``parse_source`` and ``DiskCache.open``; none for a folder that is absent.
        """
        source = parse_source(str(path))
        if not source.is_remote:
            yield Path(source.place)
        elif self._cache is None:
            raise AdapterFileError(
                f"{source.url}: remote adapters need a folder to be kept in: set cache_dir", key="path"
            )
        else:
            with self._cache.open(source) as folder:
                yield folder

    def expire(self, path: str) -> None:
        """Have remote sources asked for their version at the next read; for an explicit load or reload."""
        if self._cache is None:
            return
        paths = [one.path for one in MergeRecipe.parse(path).sources] if path.startswith(PREFIX) else [path]
        for source in map(parse_source, paths):
            if source.is_remote:
                self._cache.expire(source)

    def last_fetch(self, path: str) -> tuple[float, float] | None:
        """When the latest fetch of a remote source began and ended, in monotonic seconds; None where none is known."""
        if self._cache is None or path.startswith(PREFIX):
            return None
        source = parse_source(path)
        return self._cache.last_fetch(source) if source.is_remote else None

    def _read(self, path: Path | str, shape: BaseShape, **options: Any) -> AdapterSpec:
        with self.open(path) as folder:
            return read_adapter(folder, shape, **options)
