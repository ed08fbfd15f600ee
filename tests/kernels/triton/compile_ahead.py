"""Compiles launches for GPUs that need not be there, and prints what each kernel takes of them.

``python compile_ahead.py 90 80`` prints a JSON list, over those targets and all cases (add ``--some`` for a choice of
cases on targets other than the first): target, kernel, case, warps, registers of a thread, bytes of stack and
local memory (spills, where there are any) and of shared memory, and the matrix instructions used. The launches
are those that a server makes; only the driver is replaced.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from loraplex.kernels import gated, norms, paged_decode, paged_prefill, rope_write

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class StandInDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # what was compiled is kept by device, and each target is another one

    def get_current_stream(self, device: int) -> int:
        return 0


def attention(heads: int, kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype, window: int) -> None:
    pages = torch.zeros(4, 2, page_tokens, kv_heads, head_dim, dtype=dtype)
    q, table, lengths = torch.zeros(2, heads, head_dim, dtype=dtype), ints(2, 64), ints(2)
    paged_decode.launch_paged_decode(q, pages, table, lengths, ints(16, 2), ints(3), 0.1, window)
    paged_prefill.launch_paged_prefill(q, pages, table, ints(3), lengths, ints(2, 2), 0.1, window)


def rope(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norm: bool) -> None:
    qkv = torch.zeros(2, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weight = torch.zeros(head_dim, dtype=dtype) if norm else None
    pages, rotary = torch.zeros(4, 2, 16, kv_heads, head_dim, dtype=dtype), torch.zeros(64, head_dim)
    rope_write.launch_rope_write(qkv, ints(2), rotary, weight, weight, 1e-5, pages, ints(2))


def row_kernels(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(2, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    norms.launch_rms_norm(x, weight, 1e-5)
    norms.launch_add_rms_norm(x, x.clone(), weight, 1e-5)
    gated.launch_silu_mul(x)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


CASES: dict[str, Callable[[], None]] = {
    "d64 group 7": lambda: attention(14, 2, 64, 16, torch.bfloat16, 0),
    "d80 window": lambda: attention(32, 32, 80, 16, torch.float16, 2048),
    "d128 group 4": lambda: attention(32, 8, 128, 16, torch.bfloat16, 0),
    "d256 group 8": lambda: attention(8, 1, 256, 8, torch.bfloat16, 0),
    "d128 float32": lambda: attention(32, 8, 128, 16, torch.float32, 0),
    "rope d128": lambda: rope(32, 8, 128, torch.bfloat16, False),
    "rope d128 norm": lambda: rope(32, 8, 128, torch.bfloat16, True),
    "rows 4096": lambda: row_kernels(4096, torch.bfloat16),
    "rows 8192": lambda: row_kernels(8192, torch.bfloat16),
}
SOME = ("d128 group 4", "rope d128 norm", "rows 4096")


def compiled(capability: int, cases: Iterable[str]) -> Iterator[dict[str, Any]]:
    for case in cases:
        yield from (record(capability, case, kernel) for kernel in launched(capability, [case]))


def launched(capability: int, cases: Iterable[str]) -> list[Any]:
    """What Triton made of the launches of cases, in their order."""
    triton.runtime.driver.set_active(StandInDriver(capability))
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    with mock.patch.object(JITFunction, "run", compile_only):
        for case in cases:
            CASES[case]()
    return kernels


def record(capability: int, case: str, kernel: Any) -> dict[str, Any]:
    registers, stack, static_shared, local = map(int, usage(kernel.asm["cubin"]))
    return {
        "target": capability,
        "kernel": kernel.metadata.name,
        "case": case,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spills": stack + local,
        "shared": max(kernel.metadata.shared, static_shared),
        "compiled_for": int(kernel.metadata.target.arch),
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
        "tcgen05": "tcgen05.mma" in kernel.asm["ptx"],
    }


def usage(cubin: bytes) -> tuple[str, ...]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = USAGE.search(shown)
    assert found, shown
    return found.groups()


def main(arguments: Sequence[str]) -> None:
    targets = [int(argument) for argument in arguments if argument != "--some"]
    records = []
    for target in targets:
        some = "--some" in arguments and target != targets[0]
        records += compiled(target, SOME if some else CASES)
    print(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1:])
