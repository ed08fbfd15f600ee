"""Fail unless the torch that is installed is of a variant: ``torch_variant.py cpu|cuda``."""

from __future__ import annotations

import sys

FAULTS = {
    ("cpu", True): "torch is built for CUDA, some gigabytes of it: give a TORCH_INDEX of CPU builds",
    ("cuda", False): "torch is built without CUDA: it came from an index of CPU builds",
}


def fault(variant: str, cuda: str | None) -> str | None:
    """What is wrong with a torch for this version of CUDA, or for none."""
    return FAULTS.get((variant, cuda is not None))


if __name__ == "__main__":
    from torch import version

    sys.exit(fault(sys.argv[1], version.cuda))
