"""What ``/metrics`` answers, kept for as long as writing it anew would take too large a share of the event loop."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.openmetrics.exposition import DOTS

from loraplex.server.exposition import Family, FamilyTexts

MAX_FORMATS = 8
LONGEST_SECONDS = 0.1
GZIP_LEVEL = 1
"""A third of the time of level 6, for a tenth more bytes."""

Encode = Callable[[CollectorRegistry], bytes]


@dataclass(slots=True)
class _Page:
    """A page in one format. ``seconds`` is what it took to write."""

    body: bytes
    written: float
    seconds: float
    packed: bytes | None = None


class MetricsPage:
    """Pages by format. However many scrape, writing takes no more than a share of one thread's time.

    Args:
        registry: what is written.
        families: the same; the text format is written from these.
        share: of the time, at most, for writing; a page is given out again until that is kept to, and never for longer
            than ``LONGEST_SECONDS``.
        clock: in seconds.
        cost: seconds of work of this thread.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        families: Callable[[], Iterable[Family | Metric]],
        share: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        cost: Callable[[], float] = time.thread_time,
    ) -> None:
        self._registry = registry
        self._families = families
        self._share = share
        self._clock = clock
        self._cost = cost
        self._texts = FamilyTexts()
        self._pages: dict[str, _Page] = {}

    def answer(self, accept: str, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
        """A body and its headers, for what a client accepts."""
        encode, content_type = _format(accept)
        page = self._page(encode, content_type)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if not gzip_accepted(accept_encoding):
            return page.body, headers
        if page.packed is None:
            started = self._cost()
            page.packed = _gzip(page.body)
            page.seconds += self._cost() - started
        return page.packed, headers | {"content-encoding": "gzip"}

    def _page(self, encode: Encode, content_type: str) -> _Page:
        now, started = self._clock(), self._cost()
        page = self._pages.get(content_type)
        if page is not None and now - page.written < min(page.seconds / self._share, LONGEST_SECONDS):
            return page
        if len(self._pages) >= MAX_FORMATS:  # a format names a version of the client's choice
            self._pages.clear()
        body = self._text() if _is_text(content_type) else encode(self._registry)
        page = self._pages[content_type] = _Page(body, now, self._cost() - started)
        return page

    def _text(self) -> bytes:
        return self._texts.write(self._families()).encode()


def _format(accept: str) -> tuple[Encode, str]:
    try:
        return choose_encoder(accept)  # type: ignore[no-any-return]
    except TypeError:  # a version that is no number
        return choose_encoder("")  # type: ignore[no-any-return]


def _is_text(content_type: str) -> bool:
    """Whether it is the text format with our names as they are: they hold nothing that must be escaped but dots do."""
    return content_type.startswith("text/plain") and not content_type.endswith(f"escaping={DOTS}")


def _gzip(body: bytes) -> bytes:
    packer = zlib.compressobj(GZIP_LEVEL, wbits=31)
    return packer.compress(body) + packer.flush()
