"""Kernels run in Triton's interpreter, which has to be chosen before anything imports Triton."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
