"""Whether a failed call is made again, and when."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time

from loraplex.clients.calls import Repeat
from loraplex.clients.errors import LoraplexClientError

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0
JITTER = 0.25
"""Pauses vary by this share, so that clients that failed together do not come back together."""

LONGEST_RETRY_AFTER = 120.0
"""Asked to wait longer, a client gives up at once."""

_RETRIED_STATUSES = frozenset({429, 503})


def pause_before_retry(error: LoraplexClientError, *, attempt: int, max_retries: int, repeat: Repeat) -> float | None:
    """Seconds to wait before the call is made again; None if the error is final.

    Args:
        attempt: failed attempts before this one.
        repeat: when the call may be made again.
    """
    if attempt >= max_retries or repeat == "never" or not error.retryable:
        return None
    if repeat == "unless_sent" and error.details.sent:
        return None
    if error.retry_after is None:
        return min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE) * (1 - JITTER * random.random())  # noqa: S311
    if error.retry_after > LONGEST_RETRY_AFTER:
        return None
    return error.retry_after * (1 + JITTER * random.random())  # noqa: S311


def asks_for_retry(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer may be asked for again: ``x-should-retry`` decides where it is given."""
    decided = headers.get("x-should-retry", "").lower()
    if decided in {"true", "false"}:
        return decided == "true"
    return status in _RETRIED_STATUSES


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What ``retry-after-ms`` or ``retry-after`` (seconds or a date) ask for; None if nothing readable."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    return seconds if seconds is not None or text is None else _seconds_until(text)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time())
    except ValueError:
        return None
