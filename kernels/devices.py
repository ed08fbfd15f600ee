"""Which kernels run on which devices."""

from __future__ import annotations

from loraplex.kernels.triton_runtime import INTERPRETED, triton


def has_kernels_for(device_type: str) -> bool:
    """Whether a device is served fast: it is a CPU, or a GPU with Triton installed."""
    return device_type == "cpu" or (device_type == "cuda" and triton is not None)


def uses_triton(kernels: str, device_type: str) -> bool:
    """Whether steps run by the Triton kernels, or else by plain PyTorch operators.

    Args:
        kernels: "auto" is Triton wherever ``has_kernels_for`` a GPU; "triton"; "plain".
        device_type: "cpu" or "cuda". On a CPU the kernels run in Triton's interpreter alone.

    Raises:
        ValueError: Triton is asked for where its kernels cannot run; the message says why.
    """
    if kernels != "triton":
        return kernels == "auto" and device_type == "cuda" and triton is not None
    if triton is None:
        raise ValueError("kernels is 'triton', but Triton is not installed; install loraplex[cuda], or use 'plain'")
    if device_type == "cpu" and not INTERPRETED:
        raise ValueError(
            "kernels is 'triton', which on a CPU runs only under TRITON_INTERPRET=1; use 'auto' or 'plain'"
        )
    return True
