"""Image plans: where the rows of alike adapters lie and how they get there, worked out once for all of them.

The general way of ``build_image`` takes some twenty array operations for each low-rank pair. Where only values differ
(``AdapterSpec.values``), the way from the file to the image is the same list of copies each time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from loraplex.memory.adapter_image import (
    CHUNK,
    AdapterImage,
    ImageLayout,
    Rows,
    as_integers,
    build_image,
    plan_layout,
    rows_of,
)
from loraplex.memory.adapter_spec import AdapterSpec
from loraplex.memory.serial_torch import SERIAL_ELEMENTS
from loraplex.memory.store_states import Content, content_of

_Integers = Any  # numpy's array


@dataclass(frozen=True, slots=True)
class _Copy:
    """Some consecutive rows of a stored matrix, and where in a layer's elements they go.

    ``values[offset : offset + rows * width]``, as ``[rows, width]``, transposed if ``transposed``, goes to rows
    ``start : stop`` as ``[count, -1]`` and there to columns ``column`` on.
    """

    layer: int
    offset: int
    rows: int
    width: int
    transposed: bool
    start: int
    stop: int
    count: int
    column: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.width

    def run(self, values: _Integers, first: int, layers: Sequence[_Integers]) -> None:
        """``values`` begin at element ``first`` of the file's."""
        block = values[self.offset - first : self.end - first].reshape(self.rows, self.width)
        target = layers[self.layer][self.start : self.stop].reshape(self.count, -1)
        if self.transposed:
            target[:, self.column : self.column + self.rows] = block.T
        else:
            target[:, : self.width] = block


@dataclass(frozen=True, slots=True)
class _Clear:
    """Columns ``column`` on of ``layer[start : stop]`` as ``[count, -1]``, that no row covers."""

    layer: int
    start: int
    stop: int
    count: int
    column: int

    def run(self, layers: Sequence[_Integers]) -> None:
        layers[self.layer][self.start : self.stop].reshape(self.count, -1)[:, self.column :] = 0


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How adapters become images.

    Attributes:
        layout: of the image.
        content: what alike adapters are; identity, warnings and bytes are each one's own.
        copies: from the values to the image, those together that are converted together; None where rows are more than
            copies of values.
        clears: what is zero.
    """

    layout: ImageLayout
    content: Content
    copies: tuple[tuple[_Copy, ...], ...] | None = None
    clears: tuple[_Clear, ...] = ()

    def build(
        self, spec: AdapterSpec, num_layers: int, page_elems: int, dtype: torch.dtype, *, parts: Any, room: object
    ) -> AdapterImage:
        """Lay an adapter out; arguments as of ``build_image``."""
        if self.copies is None or spec.values is None:
            return build_image(spec, num_layers, page_elems, dtype, layout=self.layout, parts=parts, room=room)
        layers = [layer for part in parts for layer in as_integers(part).reshape(part.shape[0], -1)]
        for copies in self.copies:
            first, last = copies[0].offset, copies[-1].end
            values = spec.values.flat[first:last]
            integers = as_integers(values if values.dtype == dtype else values.to(dtype))
            for copy in copies:
                copy.run(integers, first, layers)
        for clear in self.clears:
            clear.run(layers)
        routes = spec.token_routes
        return AdapterImage(
            spec.identity, spec.kind, self.layout, parts, spec.routing, routes, spec.invocation, room=room
        )


class ImagePlans:
    """Plans for one served base. Thread-safe.

    Args:
        num_layers, dtype: of the base.
        page_elems: elements of a page in one layer.
    """

    def __init__(self, num_layers: int, page_elems: int, dtype: torch.dtype) -> None:
        self._num_layers, self._page_elems, self._dtype = num_layers, page_elems, dtype
        self._lock = threading.Lock()
        self._known: WeakKeyDictionary[object, ImagePlan] = WeakKeyDictionary()

    def plan(self, spec: AdapterSpec) -> ImagePlan:
        """The plan for an adapter; the same for all that are alike."""
        if spec.values is None:
            return self._general(spec)
        with self._lock:
            found = self._known.get(spec.values.structure)
        if found is None:
            found = self._made(spec)
            with self._lock:
                found = self._known.setdefault(spec.values.structure, found)
        return found

    def build(self, spec: AdapterSpec, plan: ImagePlan, parts: tuple[torch.Tensor, ...], room: object) -> AdapterImage:
        """Lay an adapter out in ``parts``, as ``build_image`` does."""
        return plan.build(spec, self._num_layers, self._page_elems, self._dtype, parts=parts, room=room)

    def _made(self, spec: AdapterSpec) -> ImagePlan:
        assert spec.values is not None
        plan = self._general(spec)
        rows = list(rows_of(spec, plan.layout, self._num_layers, self._dtype))
        offsets = [_offset(one, spec.values.flat) for one in rows]
        if None in offsets:
            return plan
        copies = [copy for one, offset in zip(rows, offsets) if offset is not None for copy in _copies(one, offset)]
        size = plan.content.num_pages * self._page_elems
        return replace(plan, copies=_grouped(copies), clears=tuple(_clears(rows, self._num_layers, size)))

    def _general(self, spec: AdapterSpec) -> ImagePlan:
        layout = plan_layout(spec, self._num_layers, self._dtype)
        pages = layout.num_pages(self._page_elems)
        return ImagePlan(layout, content_of(spec, self._num_layers, pages, num_bytes=0))


def _offset(rows: Rows, flat: torch.Tensor) -> int | None:
    """Where the rows lie among the values; None where they are no plain run of them."""
    values = rows.values
    offset = (values.data_ptr() - flat.data_ptr()) // flat.dtype.itemsize
    is_plain = values.dtype == flat.dtype and values.is_contiguous() and rows.gain is None
    return offset if is_plain and 0 <= offset <= flat.shape[0] - values.numel() else None


def _copies(rows: Rows, offset: int) -> Iterator[_Copy]:
    """In pieces that torch converts without other threads."""
    length, width = rows.values.shape
    step = max(1, SERIAL_ELEMENTS // width)
    start, stride = rows.start * CHUNK, rows.stride * CHUNK
    for first in range(0, length, step):
        count = min(step, length - first)
        at = offset + first * width
        if rows.transposed:
            stop = start + rows.count * stride
            yield _Copy(rows.layer, at, count, width, True, start, stop, rows.count, first)
        else:
            begin = start + first * stride
            yield _Copy(rows.layer, at, count, width, False, begin, begin + count * stride, count, 0)


def _grouped(copies: list[_Copy]) -> tuple[tuple[_Copy, ...], ...]:
    """In the order of the file; those together whose values can be converted in one go without other threads."""
    groups: list[list[_Copy]] = []
    for copy in sorted(copies, key=lambda copy: copy.offset):
        if groups and copy.end - groups[-1][0].offset <= SERIAL_ELEMENTS:
            groups[-1].append(copy)
        else:
            groups.append([copy])
    return tuple(map(tuple, groups))


def _clears(rows: list[Rows], num_layers: int, size: int) -> Iterator[_Clear]:
    """What of the layers, ``size`` elements each, no row covers."""
    spans: dict[int, list[tuple[int, int]]] = {layer: [] for layer in range(num_layers)}
    for one in rows:
        start, stop = one.start * CHUNK, (one.start + one.count * one.stride) * CHUNK
        spans[one.layer].append((start, stop))
        if one.width < one.stride * CHUNK:
            yield _Clear(one.layer, start, stop, one.count, one.width)
    for layer, covered in spans.items():
        end = 0
        for start, stop in [*sorted(covered), (size, size)]:
            if start > end:
                yield _Clear(layer, end, start, 1, 0)
            end = stop
