"""The device's ceilings: a large copy, a large product of random numbers, and a copy from pinned host memory."""

from __future__ import annotations

import torch
from context import Context
from costs import Ceilings
from record import Record
from timing import seconds

_HOST_ELEMENTS = 1 << 27


def run(context: Context) -> list[Record]:
    """Measures what all floors are reckoned with, and puts it into the context."""
    scale = context.scale
    ceilings = Ceilings(
        _copy_rate(context.device, scale.copy_bytes // 4),
        _matmul_rate(context.device, context.dtype, scale.matmul_size),
        _host_rate(context.device, min(_HOST_ELEMENTS, scale.copy_bytes // 4)),
    )
    context.ceilings = ceilings
    size = f"{scale.matmul_size}^3"
    return [
        Record(name="copy on the device, read and written", measured=ceilings.copy / 1e12, unit="TB/s"),
        Record(name=f"product {size}, {context.dtype}", measured=ceilings.matmul / 1e12, unit="TFLOP/s"),
        Record(name="copy from pinned host memory", measured=ceilings.from_host / 1e9, unit="GB/s"),
    ]


def _copy_rate(device: torch.device, elements: int) -> float:
    """Bytes a second, those read and those written, of a copy of random float32."""
    source = torch.empty(elements, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, rounds=7, inner=3)


def _host_rate(device: torch.device, elements: int) -> float:
    """Bytes a second from page-locked memory."""
    source = torch.ones(elements, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return source.nbytes / seconds(lambda: target.copy_(source, non_blocking=True), device, rounds=5, warmup=1)


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square product."""
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device, rounds=7, inner=3)
