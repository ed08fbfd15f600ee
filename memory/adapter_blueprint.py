"""Blueprints: what adapters of one recipe have in common, so that it is worked out once and not for each of them.

Fine-tunes of one recipe have the same configuration and the same header in their tensors' file, byte for byte: they
differ in values alone. Names, shapes, scales and experts follow from those bytes, and so does every check but that of
the values. What was read in full once is the blueprint of all others like it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

from loraplex.memory.adapter_family import Outline
from loraplex.memory.adapter_hash import identity_from, settings_text
from loraplex.memory.adapter_spec import AdapterSpec, LowRankPair, Router, SpecValues
from loraplex.memory.safetensors_header import header_of
from loraplex.memory.tensor_checks import values_fit
from loraplex.memory.tensor_file import SAFETENSORS_NAME, StoredFile, TensorFile, TensorListing

_Key = tuple[bytes, bytes, int]
"""Configuration, header and size of the tensors' file."""

_LONGEST_KEY = 1 << 20
"""Bytes of a key; an 8 B base's header takes 60 kB."""


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor among an adapter's values, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Blueprint:
    """An adapter without its values.

    Attributes:
        start: of the values, in bytes of the file.
        dtype: of all of them.
        settings: of the configuration, as they enter identities.
        spec: as read; its pairs and routers have no values.
        pairs: where A and B of each pair lie.
        routers: where the weight of each router lies.
    """

    start: int
    dtype: torch.dtype
    settings: bytes
    spec: AdapterSpec
    pairs: tuple[tuple[LowRankPair, _View, _View], ...]
    routers: tuple[tuple[Router, _View], ...]

    def flat(self, data: torch.Tensor) -> torch.Tensor:
        """All values of a file's bytes."""
        return data[self.start :].view(self.dtype)

    def spec_of(self, digest: bytes, flat: torch.Tensor) -> AdapterSpec:
        """An adapter with these values."""
        return replace(
            self.spec,
            identity=identity_from(digest, self.settings),
            pairs=_Pairs(self, flat),
            routers=tuple(Router(router.layer, router.site, weight.of(flat)) for router, weight in self.routers),
            values=SpecValues(self, flat),
        )


class _Pairs(Sequence[LowRankPair]):
    """Those of an adapter with some values, each made when asked for: hundreds, and most adapters' nobody asks for."""

    __slots__ = ("_blueprint", "_flat")

    def __init__(self, blueprint: _Blueprint, flat: torch.Tensor) -> None:
        self._blueprint, self._flat = blueprint, flat

    def __len__(self) -> int:
        return len(self._blueprint.pairs)

    @overload
    def __getitem__(self, at: int) -> LowRankPair: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[LowRankPair]: ...
    def __getitem__(self, at: int | slice) -> LowRankPair | Sequence[LowRankPair]:
        if isinstance(at, slice):
            return tuple(self)[at]
        pair, a, b = self._blueprint.pairs[at]
        return LowRankPair(pair.site, pair.layer, a.of(self._flat), b.of(self._flat), pair.scale, pair.expert)


class Blueprints:
    """The recipes that were read last, for one served base. Thread-safe.

    Args:
        limit: so many are kept.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, _Blueprint] = OrderedDict()

    def read(self, config: bytes, stored: StoredFile, dtype: torch.dtype | None) -> AdapterSpec | None:
        """An adapter by its blueprint; None where there is none, or where its values must be looked at one by one.

        Args:
            config: bytes of the configuration.
            stored: the tensors' file.
            dtype: of the served model; values beyond its range do not fit.
        """
        key = _key(config, stored)
        with self._lock:
            found = None if key is None else self._known.get(key)
            if found is None or key is None:
                return None
            self._known.move_to_end(key)
        flat = found.flat(stored.data)
        return found.spec_of(stored.hashing.digest(), flat) if values_fit(flat, dtype) else None

    def learn(
        self,
        config: bytes,
        stored: StoredFile,
        file: TensorFile,
        spec: AdapterSpec,
        outline: Callable[[TensorListing], Outline],
    ) -> AdapterSpec:
        """Keep the blueprint of an adapter that was read in full, if it can have one.

        Returns the adapter, with its ``values`` where it has a blueprint.
        """
        key = _key(config, stored)
        made = None if key is None else _blueprint(stored, file, spec, outline)
        if key is None or made is None:
            return spec
        with self._lock:
            made = self._known.setdefault(key, made)
            self._known.move_to_end(key)
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        return replace(spec, values=SpecValues(made, made.flat(stored.data)))


def _key(config: bytes, stored: StoredFile) -> _Key | None:
    header = header_of(stored.data.numpy().data) if stored.name == SAFETENSORS_NAME else None
    if header is None or len(header) + len(config) > _LONGEST_KEY:
        return None
    return config, header, stored.data.shape[0]


def _blueprint(
    stored: StoredFile, file: TensorFile, spec: AdapterSpec, outline: Callable[[TensorListing], Outline]
) -> _Blueprint | None:
    """None unless every tensor of the file, and nothing else, enters the adapter as it is."""
    dtypes = {tensor.dtype for tensor in file.tensors.values()}
    halves = [half for pair in spec.pairs for half in (pair.a, pair.b)]
    used = [*halves, *(router.weight for router in spec.routers)]
    if len(dtypes) != 1 or len(used) != len(file.tensors) or spec.token_routes is not None:
        return None
    if any(pair.gain is not None for pair in spec.pairs):
        return None
    (dtype,) = dtypes
    start = stored.data.shape[0] - sum(tensor.nbytes for tensor in file.tensors.values())
    views = [_view(tensor, stored.data, start, dtype) for tensor in used]
    found = [view for view in views if view is not None]
    if start % dtype.itemsize or len(found) != len(views):
        return None
    listing = TensorListing(
        file.name, stored.data.shape[0], {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}, None
    )
    said = outline(listing)
    settings = settings_text(said.kind, said.settings)
    assert identity_from(file.digest, settings) == spec.identity, "an outline and an adapter disagree"
    none = torch.empty(0)
    pairs = [replace(pair, a=none, b=none) for pair in spec.pairs]
    routers = [replace(router, weight=none) for router in spec.routers]
    return _Blueprint(
        start,
        dtype,
        settings,
        replace(spec, pairs=(), routers=(), values=None),
        tuple(zip(pairs, found[: len(halves) : 2], found[1 : len(halves) : 2], strict=True)),
        tuple(zip(routers, found[len(halves) :], strict=True)),
    )


def _view(tensor: torch.Tensor, data: torch.Tensor, start: int, dtype: torch.dtype) -> _View | None:
    """Where a tensor lies among the values behind ``start``; None if it lies elsewhere."""
    offset = tensor.data_ptr() - data.data_ptr() - start
    if tensor.dtype != dtype or not 0 <= offset <= data.shape[0] - start - tensor.nbytes or offset % dtype.itemsize:
        return None
    return _View(tuple(tensor.shape), tuple(tensor.stride()), offset // dtype.itemsize)
