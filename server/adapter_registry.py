"""Which names are served: the base model, and the adapters registered beside it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from loraplex.memory.adapter_name import name_problem
from loraplex.memory.merge_recipe import PREFIX
from loraplex.server.errors import InvalidRequestError, ModelNotFoundError
from loraplex.server.messages import AdapterInfo, AdapterRef

MAX_SHOWN = 256


@dataclass(frozen=True, slots=True)
class RegisteredAdapter:
    """A name that requests may ask for. ``info`` is None until the engine has read the adapter."""

    ref: AdapterRef
    created: int
    info: AdapterInfo | None = None


@dataclass(slots=True)
class AdapterRegistry:
    """Names to adapters. It never touches the disk: a name is looked up, never joined to a path.

    Args:
        base_name: the name of the base model.
    """

    base_name: str
    created: int = field(default_factory=lambda: int(time.time()))
    _adapters: dict[str, RegisteredAdapter] = field(default_factory=dict)
    _revisions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __len__(self) -> int:
        return len(self._adapters)

    def register_all(self, refs: Iterable[AdapterRef]) -> None:
        """Registers adapters without reading them; their files are read on first use."""
        for ref in refs:
            self.check_name(ref.name)
            check_path(ref.path, "lora_path")
            self.register(ref)

    def register(self, ref: AdapterRef, info: AdapterInfo | None = None) -> RegisteredAdapter:
        """Makes a name visible, in place of an earlier registration of it."""
        registered = self._adapters[ref.name] = RegisteredAdapter(ref, int(time.time()), info)
        return registered

    def remove(self, name: str) -> AdapterRef | None:
        """Forgets a name; returns what it stood for."""
        found = self._adapters.pop(name, None)
        return found.ref if found else None

    def get(self, name: str) -> RegisteredAdapter | None:
        return self._adapters.get(name)

    def refs(self) -> list[AdapterRef]:
        """Every registration, for an engine that was started again."""
        return [adapter.ref for adapter in self._adapters.values()]

    def new_ref(self, name: str, path: str) -> AdapterRef:
        """A registration to be, with a revision that no other has."""
        return AdapterRef(name=name, path=path, revision=next(self._revisions))

    def listed(self, *, after: str | None = None, limit: int | None = None) -> tuple[list[RegisteredAdapter], bool]:
        """A page of adapters in order of their names, and whether more follow. ``after`` need not exist (any more)."""
        names = sorted(name for name in self._adapters if after is None or name > after)
        page = names if limit is None else names[:limit]
        return [self._adapters[name] for name in page], len(page) < len(names)

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
