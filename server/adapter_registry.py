"""Which names are served: the base model, and the adapters registered beside it."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loraplex.memory.adapter_name import name_problem
from loraplex.memory.merge_recipe import PREFIX
from loraplex.server.errors import InvalidRequestError, ModelNotFoundError
from loraplex.server.messages import AdapterInfo, AdapterRef, AdapterState, RestoredAdapter

MAX_SHOWN = 256
MAX_TAGS = 32
MAX_TAG_LENGTH = 64

Origin = Literal["folder", "setting", "api", "upload"]
"""Who registered an adapter: the folder of adapters, a setting, a path given over HTTP, or files sent over HTTP."""


@dataclass(frozen=True, slots=True)
class RegisteredAdapter:
    """A name that requests may ask for.

    Attributes:
        created: in Unix seconds.
        info: None until an engine has read the adapter; it stays known.
        identity_before: the identity that an earlier server knew, for as long as this one has not read the adapter.
    """

    ref: AdapterRef
    created: int
    info: AdapterInfo | None = None
    pinned: bool = False
    tags: tuple[str, ...] = ()
    origin: Origin = "folder"
    identity_before: str | None = None

    @property
    def identity(self) -> str | None:
        return self.identity_before if self.info is None else self.info.identity


@dataclass(slots=True)
class AdapterRegistry:
    """Names to adapters. It never touches the disk: a name is looked up, never joined to a path.

    Args:
        base_name: the name of the base model.

    Attributes:
        version: changes with any registration.
    """

    base_name: str
    version: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    _adapters: dict[str, RegisteredAdapter] = field(default_factory=dict)
    _sorted: list[str] = field(default_factory=list)
    _names: dict[tuple[str, int], str] = field(default_factory=dict)
    _revisions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[RegisteredAdapter]:
        return iter(self._adapters.values())

    def register_all(self, refs: Iterable[AdapterRef], origin: Origin = "folder") -> None:
        """Registers adapters without reading them; their files are read on first use."""
        for ref in refs:
            self.check_name(ref.name)
            check_path(ref.path, "lora_path")
            self.register(ref, origin=origin)

    def register(self, ref: AdapterRef, info: AdapterInfo | None = None, **facts: Any) -> RegisteredAdapter:
        """Makes a name visible, in place of an earlier registration of it.

        Args:
            facts: further attributes of ``RegisteredAdapter``.
        """
        return self._put(RegisteredAdapter(ref, facts.pop("created", None) or int(time.time()), info, **facts))

    def change(self, name: str, **facts: Any) -> RegisteredAdapter | None:
        """Gives attributes of a registration other values; None if there is no such name (any more)."""
        known = self._adapters.get(name)
        return None if known is None else self._put(replace(known, **facts))

    def note(self, states: Sequence[AdapterState]) -> list[RegisteredAdapter]:
        """Keeps what an engine says that adapters are; returns those whose identity is news."""
        news: list[RegisteredAdapter] = []
        for state in states:
            name = self._names.get((state.path, state.revision))
            known = None if name is None else self._adapters[name]
            if known is not None and state.info is not None and state.info != known.info:
                noted = self._put(replace(known, info=state.info))
                news += [noted] if noted.identity != known.identity else []
        return news

    def remove(self, name: str) -> RegisteredAdapter | None:
        """Forgets a name; returns what it stood for."""
        found = self._adapters.pop(name, None)
        if found is not None:
            self.version += 1
            del self._sorted[bisect.bisect_left(self._sorted, name)]
            self._names.pop((found.ref.path, found.ref.revision), None)
        return found

    def name_at(self, key: tuple[str, int]) -> str | None:
        """The name of the registration with this path and revision."""
        return self._names.get(key)

    def get(self, name: str) -> RegisteredAdapter | None:
        return self._adapters.get(name)

    def restored(self) -> list[RestoredAdapter]:
        """What a new engine should know: registrations whose content is known, or which are pinned."""
        return [
            RestoredAdapter(adapter=adapter.ref, identity=adapter.identity, pinned=adapter.pinned)
            for adapter in self._adapters.values()
            if adapter.pinned or adapter.identity is not None
        ]

    def new_ref(self, name: str, path: str) -> AdapterRef:
        """A registration to be, with a revision that no other has."""
        return AdapterRef(name=name, path=path, revision=next(self._revisions))

    def listed(
        self,
        *,
        after: str | None = None,
        limit: int | None = None,
        prefix: str = "",
        accept: Callable[[RegisteredAdapter], bool] | None = None,
    ) -> tuple[list[RegisteredAdapter], bool]:
        """A page of adapters in order of their names, and whether more follow. ``after`` need not exist (any more).

        Without ``accept`` it costs the page; with it, what has to be passed over as well.
        """
        page: list[RegisteredAdapter] = []
        for at in range(self._start(after, prefix), len(self._sorted)):
            name = self._sorted[at]
            if not name.startswith(prefix):
                break
            adapter = self._adapters[name]
            if accept is not None and not accept(adapter):
                continue
            if limit is not None and len(page) >= limit:
                return page, True
            page.append(adapter)
        return page, False

    def check_name(self, name: str, param: str = "lora_name") -> None:
        """Refuses names that could be mistaken for a path, a list or the base model."""
        if problem := name_problem(name):
            raise InvalidRequestError(f"'{param}' is not accepted: {problem}.", param=param)
        if name == self.base_name:
            raise InvalidRequestError(f"'{param}' is the name of the base model; choose another.", param=param)

    def resolve(self, model: str | None, adapter_id: str | None = None) -> RegisteredAdapter | None:
        """The adapter that a request asks for; None is the base model.

        ``adapter_id`` empty or absent leaves the choice to ``model``, which is the base model's name or empty, an
        adapter's name, or ``base:adapter``.

        Raises:
            ModelNotFoundError: no such name.
            InvalidRequestError: the two name different adapters.
        """
        by_model = self.find(model, "model") if model else None
        if not adapter_id:
            return by_model
        by_id = self.find(adapter_id, "adapter_id")
        if by_model is not None and (by_id is None or by_id.ref.name != by_model.ref.name):
            raise InvalidRequestError(
                f"'adapter_id' is '{adapter_id}' but 'model' names the adapter '{by_model.ref.name}'; give one of them,"
                " or the same in both.",
                param="adapter_id",
            )
        return by_id

    def find(self, name: str, param: str) -> RegisteredAdapter | None:
        """The adapter of a name; None for the base model's. ModelNotFoundError if there is neither."""
        if name == self.base_name:
            return None
        found = self._adapters.get(name) or self._adapters.get(name.removeprefix(f"{self.base_name}:"))
        if found is None:
            raise ModelNotFoundError(_not_found(name, param), param=param)
        return found

    def named(self, name: str, param: str) -> RegisteredAdapter:
        """The adapter of just this name; ModelNotFoundError if there is none."""
        found = self._adapters.get(name)
        if found is None:
            raise ModelNotFoundError(f"The adapter '{name[:MAX_SHOWN]}' does not exist.", param=param)
        return found

    def check_integrity(self) -> None:
        """Every name is listed once, in order, and found by its registration."""
        assert self._sorted == sorted(self._adapters)
        found = {(adapter.ref.path, adapter.ref.revision): name for name, adapter in self._adapters.items()}
        assert self._names == found
        assert all(adapter.ref.name == name for name, adapter in self._adapters.items())

    def _put(self, adapter: RegisteredAdapter) -> RegisteredAdapter:
        ref = adapter.ref
        self.version += 1
        known = self._adapters.get(ref.name)
        if known is None:
            bisect.insort(self._sorted, ref.name)
        else:
            self._names.pop((known.ref.path, known.ref.revision), None)
        self._adapters[ref.name] = adapter
        self._names[ref.path, ref.revision] = ref.name
        return adapter

    def _start(self, after: str | None, prefix: str) -> int:
        start = bisect.bisect_left(self._sorted, prefix)
        return start if after is None else max(start, bisect.bisect_right(self._sorted, after))


def check_tags(tags: Iterable[str], param: str = "tags") -> tuple[str, ...]:
    """Tags without repetitions, in order; refuses those that could not be asked for."""
    found = tuple(sorted({tag.strip() for tag in tags}))
    if len(found) > MAX_TAGS:
        raise InvalidRequestError(f"'{param}' has {len(found)} tags; accepted are at most {MAX_TAGS}.", param=param)
    for tag in found:
        if not 0 < len(tag) <= MAX_TAG_LENGTH or not tag.isprintable() or "," in tag:
            raise InvalidRequestError(
                f"'{param}' holds {tag[:MAX_TAG_LENGTH]!r}; a tag has 1 to {MAX_TAG_LENGTH} printable characters and"
                " no comma.",
                param=param,
            )
    return found


def _not_found(name: str, param: str) -> str:
    shown = name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."
    kind = "model or adapter" if param == "model" else "adapter"
    return f"The {kind} '{shown}' does not exist; GET /v1/models lists what is served."


def check_path(path: str, param: str) -> None:
    """Refuses a path that the engine would read as the recipe of a merged adapter."""
    if path.startswith(PREFIX):
        raise InvalidRequestError(
            f"'{param}' begins with '{PREFIX}', which is kept for merged adapters; accepted is a folder.", param=param
        )
