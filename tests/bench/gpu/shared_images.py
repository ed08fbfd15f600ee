"""Adapter images that are on the host already, as the scheduler and the engine see the host store."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import checkout  # noqa: F401  (before anything of loraplex)

from loraplex.memory.adapter_image import AdapterImage
from loraplex.server.adapter_directory import AdapterReady
from loraplex.server.messages import AdapterRef


class SharedImages:
    """An ``AdapterDirectory`` in which every adapter is ready; any number may share the memory of one image."""

    def __init__(self) -> None:
        self._images: dict[str, AdapterImage] = {}

    def put(self, image: AdapterImage) -> AdapterRef:
        """Take an image in; its identity is its name."""
        self._images[image.identity] = image
        return AdapterRef(name=image.identity, path=image.identity)

    def lookup(self, ref: AdapterRef) -> AdapterReady:
        image = self._images[ref.path]
        return AdapterReady(image.identity, image.num_pages, image.invocation)

    def image(self, ref: AdapterRef) -> AdapterImage:
        return self._images[ref.path]

    def hold(self, ref: AdapterRef) -> None:
        """Nothing leaves."""

    def release_hold(self, ref: AdapterRef) -> None:
        """Nothing leaves."""

    def forget(self, ref: AdapterRef) -> None:
        """Nothing leaves."""

    def is_full_of(self, refs: Collection[AdapterRef]) -> bool:
        return False

    def is_at_hand(self, ref: AdapterRef) -> bool:
        return True

    def keys_of(self, identity: str) -> Collection[tuple[str, int]]:
        return ()

    def content_of(self, identity: str) -> None:
        """Nothing is told of them."""

    def by_name(self, counts: Mapping[str, list[int]]) -> dict[str, list[int]]:
        return dict(counts)
