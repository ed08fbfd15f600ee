"""What a loader does without the store's lock: reading an adapter, and laying its image out in a room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from loraplex.memory.adapter_blueprint import Blueprints
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.adapter_spec import AdapterSpec, BaseShape, BaseWeights
from loraplex.memory.host_slab import SlabRoom
from loraplex.memory.image_plan import ImagePlan, ImagePlans
from loraplex.memory.store_retries import read_patiently
from loraplex.memory.store_states import Content

FILE_TO_IMAGE = 4
"""A file of float64 makes an image of a quarter of its size."""


def bounded_reader(
    read: Callable[..., AdapterSpec],
    shape: BaseShape,
    dtype: torch.dtype,
    byte_limit: int,
    *,
    allow_bin: bool = False,
    base_name: str | tuple[str, ...] | None = None,
    base_weights: BaseWeights | None = None,
) -> Callable[[str], AdapterSpec]:
    """Reads for a store of so many bytes by ``read``, which is ``read_source`` or takes what that takes; the other
    arguments are those of ``read_adapter``."""
    return partial(
        read,
        blueprints=Blueprints(),
        shape=shape,
        allow_bin=allow_bin,
        max_bytes=FILE_TO_IMAGE * byte_limit,
        base_name=base_name,
        dtype=dtype,
        base_weights=base_weights,
    )


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter that was read.

    Attributes:
        spec: as read.
        plan: how it is laid out.
        content: what it is, with the bytes of its image.
        heap_bytes: of them, those beside the rows.
    """

    spec: AdapterSpec
    plan: ImagePlan
    content: Content
    heap_bytes: int


class AdapterReading:
    """Reads adapters and makes their images. Thread-safe.

    Args:
        reader: reads a path.
        num_layers, page_elems, dtype: of the images.
        block_bytes: of a page in one layer.
        byte_limit: of the store.
        sleep: waits between tries.
    """

    def __init__(
        self,
        reader: Callable[[str], AdapterSpec],
        *,
        num_layers: int,
        page_elems: int,
        dtype: torch.dtype,
        block_bytes: int,
        byte_limit: int,
        sleep: Callable[[float], object],
    ) -> None:
        self._reader, self._sleep = reader, sleep
        self._num_layers, self._block_bytes, self._byte_limit = num_layers, block_bytes, byte_limit
        self._plans = ImagePlans(num_layers, page_elems, dtype)

    def read(self, path: str) -> ReadAdapter:
        """Read a path, patiently. AdapterFileError also where its image could never be in the store."""
        spec = read_patiently(partial(self._reader, path), self._sleep)
        plan = self._plans.plan(spec)
        heap_bytes = spec.token_routes.num_bytes if spec.token_routes else 0
        num_bytes = heap_bytes + self._num_layers * plan.content.num_pages * self._block_bytes
        if num_bytes > self._byte_limit:
            raise AdapterFileError(
                f"the adapter takes {num_bytes} bytes in the host store, which may hold {self._byte_limit}", key="bytes"
            )
        content = replace(plan.content, identity=spec.identity, warnings=spec.warnings, num_bytes=num_bytes)
        return ReadAdapter(spec, plan, content, heap_bytes)

    def lay_out(self, read: ReadAdapter, room: SlabRoom) -> AdapterImage:
        """The image of an adapter, in a room for it."""
        return self._plans.build(read.spec, read.plan, room.parts, room)
