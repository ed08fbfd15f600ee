"""Proof that a host store's books agree: images, registrations and holds."""

from __future__ import annotations

from loraplex.memory.store_holds import Holds
from loraplex.memory.store_images import HostImages
from loraplex.memory.store_records import Record, Records
from loraplex.memory.store_states import Ready


def check_books(images: HostImages, records: Records, holds: Holds) -> None:
    """AssertionError where they disagree. Costs time in proportion to all of them."""
    images.check_integrity()
    records.check_integrity()
    holds.check_integrity()
    ready = [record for record in records if isinstance(record.state, Ready)]
    assert sum(record.pins for record in ready) == images.num_pins
    assert len(ready) == images.num_shares
    for record in ready:
        _check_ready(record, images)
    for key in holds.pinned:
        holding = records.find(key)
        assert holding is not None, "a registration that holds an image is not known"
        assert holding.pins, "an image that is held is not pinned"


def _check_ready(record: Record, images: HostImages) -> None:
    assert isinstance(record.state, Ready)
    held = images.find(record.state.image.identity)
    assert held is not None, "a registration has an image that is not here"
    assert record.key in held.keys, "a registration shares an image that does not know it"
    assert held.image is record.state.image
    assert record.content is held.content
    assert held.pins >= record.pins >= 0
