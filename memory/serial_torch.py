"""Computing in the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SERIAL_ELEMENTS = 32_768
"""torch shares out larger operations to its threads. A loader that waits for them, while the model keeps them busy,
takes ten times as long: it works in blocks of at most so many elements."""


@contextmanager
def one_thread(afterwards: int | None = None) -> Iterator[None]:
    """Keep torch from sharing out this thread's operations to others.

    A loader that waits for threads which the model keeps busy takes many times as long. And it slows the model: OpenMP
    starts a team for each thread that shares out work, and while a process has more of their threads than cores, its
    libgomp lets idle ones sleep at once, which makes small operators take four times as long.

    torch keeps the number for each thread; only threads that use torch for the first time meanwhile inherit it.

    Args:
        afterwards: the number that is set at the end; by default what it was. Threads that come and go while others are
            in here must say: what it was may be what those have set.
    """
    before = torch.get_num_threads() if afterwards is None else afterwards
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
