"""The images in host memory: who shares them, which could go, and which goes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from loraplex.memory.adapter_image import AdapterImage
from loraplex.memory.eviction_order import EvictionOrder
from loraplex.memory.host_slab import HostSlab, SlabRoom
from loraplex.memory.store_states import Content, Key, KindUse


@dataclass(slots=True, eq=False)
class HeldImage:
    """One image, or the room that it is being laid out in, and the registrations that share it.

    Attributes:
        content: what it is.
        room: its blocks.
        heap_bytes: that it takes besides.
        image: None until it is laid out.
    """

    content: Content
    room: SlabRoom
    heap_bytes: int
    image: AdapterImage | None = None
    keys: set[Key] = field(default_factory=set)
    pins: int = 0

    @property
    def is_idle(self) -> bool:
        return self.image is not None and not self.pins


class HostImages:
    """Images by identity, within a budget at every moment. Not thread-safe.

    What is laid out and not pinned lies in the eviction order, for its bytes.

    Args:
        slab: their memory.
        byte_limit: of the slab's blocks in use and what images take besides.
        order: what could go.
        worth: of keeping a content, for its size (see ``EvictionOrder.add``).
        on_gone: told the image that is gone, and why: "room", "forgotten" or "changed".
    """

    def __init__(
        self,
        slab: HostSlab,
        byte_limit: int,
        order: EvictionOrder,
        worth: Callable[[Content], float],
        on_gone: Callable[[HeldImage, str], None],
    ) -> None:
        self._slab, self._byte_limit, self._order = slab, byte_limit, order
        self._worth, self._on_gone = worth, on_gone
        self._images: dict[str, HeldImage] = {}
        self._busy: dict[str, HeldImage] = {}  # not in the order
        self._num_blocks = self._heap_bytes = 0  # of the images
        self._kinds: dict[str, KindUse] = {}
        self.evictions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def num_bytes(self) -> int:
        """Of all images, and of those that are gone but still being read."""
        return self._slab.used_bytes + self._heap_bytes

    @property
    def free_bytes(self) -> int:
        """That could be taken without any image going."""
        return min(self._byte_limit - self.num_bytes, self._slab.num_free * self._slab.block_bytes)

    @property
    def by_kind(self) -> Mapping[str, KindUse]:
        return dict(self._kinds)

    @property
    def num_shares(self) -> int:
        """Registrations that share the images. Costs time in proportion to their number, as ``num_pins`` does."""
        return sum(len(held.keys) for held in self._images.values())

    @property
    def num_pins(self) -> int:
        return sum(held.pins for held in self._images.values())

    def find(self, identity: str) -> HeldImage | None:
        """The image of a content, or where it is being laid out."""
        return self._images.get(identity)

    def reserve(self, content: Content, num_layers: int, heap_bytes: int, *, patient: bool = False) -> HeldImage | None:
        """Room for a new image. Idle ones go for it, if that suffices; else none goes, and this is None.

        Args:
            num_layers: of the image.
            heap_bytes: that it takes besides its blocks.
            patient: no more go, and this is None too, where those suffice that have gone but are still being read.
        """
        room = self._allocate(num_layers, content.num_pages, heap_bytes)
        if room is None and self._could_fit(num_layers, content.num_pages, heap_bytes):
            while room is None and self._order.size and not (patient and self._suffices_soon(content.num_bytes)):
                self._order.put_out_first()
                room = self._allocate(num_layers, content.num_pages, heap_bytes)
        if room is None:
            return None
        held = HeldImage(content, room, heap_bytes)
        self._images[content.identity] = self._busy[content.identity] = held
        self._count(held, 1)
        return held

    def _suffices_soon(self, num_bytes: int) -> bool:
        leaving = self._slab.used_bytes - self._num_blocks * self._slab.block_bytes
        return leaving > 0 and self.num_bytes - leaving + num_bytes <= self._byte_limit

    def _allocate(self, num_layers: int, num_pages: int, heap_bytes: int) -> SlabRoom | None:
        if self.num_bytes + heap_bytes + num_layers * num_pages * self._slab.block_bytes > self._byte_limit:
            return None
        return self._slab.allocate(num_layers, num_pages)

    def _could_fit(self, num_layers: int, num_pages: int, heap_bytes: int) -> bool:
        """Whether there is room once everything idle is gone. Costs time in proportion to what is not."""
        others = self._busy.values()
        taken = sum(held.heap_bytes + held.room.num_blocks * self._slab.block_bytes for held in others)
        if taken + heap_bytes + num_layers * num_pages * self._slab.block_bytes > self._byte_limit:
            return False
        return self._slab.would_fit(num_layers, num_pages, (held.room for held in others))

    def finish(self, held: HeldImage, image: AdapterImage) -> None:
        """An image is laid out in its room."""
        held.image = image
        self._rest(held)

    def abandon(self, held: HeldImage) -> None:
        """It will not be laid out."""
        self._leave_busy(held)
        self._drop(held)

    def join(self, held: HeldImage, key: Key) -> None:
        """One more registration shares an image that is laid out."""
        held.keys.add(key)
        self.touch(held)

    def leave(self, held: HeldImage, key: Key, reason: str) -> None:
        """A registration shares it no more; with the last one it is gone."""
        held.keys.remove(key)
        self.drop_unshared(held, reason)

    def drop_unshared(self, held: HeldImage, reason: str) -> None:
        """Let an image go that is not pinned, if nobody shares it."""
        if held.keys:
            return
        self._order.discard(held.content.identity)
        self._drop(held)
        self._gone(held, reason)

    def touch(self, held: HeldImage) -> None:
        """It is wanted again, so its worth has changed."""
        if held.is_idle:
            self._order.discard(held.content.identity)
            self._add_idle(held)

    def pin(self, held: HeldImage) -> None:
        """Keep it until as many calls of ``unpin``."""
        held.pins += 1
        if held.pins == 1:
            self._order.discard(held.content.identity)
            self._busy[held.content.identity] = held

    def unpin(self, held: HeldImage) -> None:
        """Undo one ``pin``."""
        assert held.pins > 0, "unpinned more often than pinned"
        held.pins -= 1
        if held.pins == 0:
            self._rest(held)

    def put_out(self, key: Hashable) -> None:
        """Give up an idle image, for the eviction order."""
        assert isinstance(key, str)
        held = self._images[key]
        self._drop(held)
        self._gone(held, "room")

    def _rest(self, held: HeldImage) -> None:
        self._leave_busy(held)
        self._add_idle(held)

    def _leave_busy(self, held: HeldImage) -> None:
        del self._busy[held.content.identity]

    def _add_idle(self, held: HeldImage) -> None:
        content = held.content
        self._order.add(content.identity, content.num_bytes, self, self._worth(content))

    def _drop(self, held: HeldImage) -> None:
        del self._images[held.content.identity]
        self._count(held, -1)

    def _gone(self, held: HeldImage, reason: str) -> None:
        self.evictions[reason] += 1
        self._on_gone(held, reason)

    def _count(self, held: HeldImage, change: int) -> None:
        self._num_blocks += change * held.room.num_blocks
        self._heap_bytes += change * held.heap_bytes
        kind, num_bytes = held.content.kind, held.content.num_bytes
        use = self._kinds.pop(kind, KindUse(0, 0))
        if use.adapters + change:
            self._kinds[kind] = KindUse(use.adapters + change, use.num_bytes + change * num_bytes)

    def check_integrity(self) -> None:
        """AssertionError where blocks, bytes, pins, the order and the counts disagree."""
        held = list(self._images.values())
        self._slab.check_integrity([one.room for one in held])
        rooms = [run for one in held for run in one.room.runs]
        assert len(set(rooms)) == len(rooms), "two images share a room"
        assert self._heap_bytes == sum(one.heap_bytes for one in held)
        assert self._num_blocks == sum(one.room.num_blocks for one in held)
        assert sum(one.content.num_bytes for one in held) <= self.num_bytes <= self._byte_limit
        idle = {one.content.identity: one for one in held if one.is_idle}
        assert set(self._order.keys) == idle.keys()
        assert self._order.size == sum(one.content.num_bytes for one in idle.values())
        assert self._busy.keys() == self._images.keys() - idle.keys()
        for kind in {*self._kinds, *(one.content.kind for one in held)}:
            sizes = [one.content.num_bytes for one in held if one.content.kind == kind]
            assert self._kinds[kind] == KindUse(len(sizes), sum(sizes))
        for one in held:
            assert one.keys or one.image is None, "nobody has this image registered"
            assert one.image is None or one.image.room is one.room
