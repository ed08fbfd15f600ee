"""What must be true of sequences and of what they own, whenever the scheduler is not at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.kv_cache import KvCache
from loraplex.server.page_ins import PageIns
from loraplex.server.request import Sequence


def check_ownership(
    kv: KvCache,
    adapters: AdapterCache,
    page_ins: PageIns,
    running: List[Sequence],
    ended: List[Sequence],
    waiting: List[Sequence],
) -> None:
    """AssertionError unless those who run, or ran until just now, and what is on its way own all that is owned."""
    owners = [*running, *ended]
    assert not any(kv.pages(sequence.seq_id) or sequence.pinned for sequence in waiting)
    assert not any(sequence.holds_adapters for sequence in owners)
    assert set(kv.sequences) <= {sequence.seq_id for sequence in owners}
    for sequence in running:
        assert not kv.missing_pages(sequence.seq_id, sequence.num_computed)
        assert sequence.pinned == tuple(image.identity for image in sequence.request.images)
    pins = Counter(identity for sequence in owners for identity in sequence.pinned)
    pins.update(page_ins.under_way)
    assert pins == {name: adapters.pins(name) for name in adapters.resident if adapters.pins(name)}
