"""How far a start is, as those who wait for it are told."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes of weights read, bytes in all)."""
