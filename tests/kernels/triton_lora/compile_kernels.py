"""Compiles every configuration of the low-rank kernels for GPUs that need not be here, and prints what they take.

Run as a program with dtypes (``bf16,fp16``) and capabilities (``80 90``), without TRITON_INTERPRET. The last line is
JSON: a list of {kernel, capability, constants, registers, spills, shared, instructions}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex.kernels import lora_triton, route_triton
from loraplex.kernels.lora_launch import EXPAND_WARPS, SHRINK_WARPS, SUM_WARPS
from loraplex.kernels.lora_tiles import ROW_BLOCKS
from loraplex.kernels.route_launch import MAX_SLOTS, ROUTER_ROWS, SORT_BLOCK

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GROUP = {"first_site": 0, "table_sites": 7, "out_0": 4096, "out_1": 1024, "out_2": 1024}
PLACES = {"page_chunks": 256, "tiles": 64}
ROUTER = {"router_site": 3, "router_sites": 8, "splits": 8, "block_experts": 16}
BY_KERNEL: dict[str, dict[str, Any]] = {
    "shrink_kernel": {
        "num_sites": 3,
        "in_features": 4096,
        "splits": 8,
        "split_chunks": 4,
        "block_ranks": 16,
        "striped": False,
        "wide": False,
        **PLACES,
    },
    "expand_kernel": {"num_sites": 3, "block_ranks": 32, "striped": False, "wide": False, "biased": True, **PLACES},
    "row_sum_kernel": {"block_columns": 512},
    "router_scores_kernel": {
        **ROUTER,
        **PLACES,
        "in_features": 4096,
        "split_chunks": 8,
        "wide_chunk": 64,
        "block_rows": ROUTER_ROWS,
    },
    "choose_kernel": {**ROUTER, "most": 2},
    "sort_slots_kernel": {"block_rows": 16, "block": SORT_BLOCK},
    "count_blocks_kernel": {
        "num_sites": 3,
        "columns_0": 32,
        "columns_1": 8,
        "columns_2": 8,
        "parts": 8,
        "block_ranks": 16,
        "tiles": MAX_SLOTS,
    },
}
HALF = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
OF_MODEL_DTYPE = {"x_ptr", "chunks_ptr", "base_ptr", "bias_ptr", "y_ptr"}
IN_FP32 = {
    "low_ptr",
    "deltas_ptr",
    "scales_ptr",
    "weights_ptr",
    "scores_ptr",
    "wide_chunks_ptr",
    "chosen_ptr",
    "slot_weights_ptr",
    "mix_weights_ptr",
    "top_p_ptr",
    "temperature_ptr",
}


def configurations() -> Iterator[tuple[str, dict[str, Any], int]]:
    """(kernel, constants, warps) of the launches that ``lora_launch.py`` makes."""
    for block_rows in ROW_BLOCKS:
        parts = 8 if block_rows == 16 else 1
        yield "shrink_kernel", {"block_rows": block_rows, "parts": parts}, SHRINK_WARPS[block_rows]
        for as_deltas in (False, True) if block_rows == 16 else (False,):
            flags = {"as_deltas": as_deltas, "base_by_entry": as_deltas, "gains": as_deltas, "parts": parts}
            yield "expand_kernel", {"block_rows": block_rows, **flags}, EXPAND_WARPS[block_rows]
    everything = {"block_rows": 64, "as_deltas": False, "base_by_entry": False, "gains": True, "parts": 8}
    yield "expand_kernel", everything, EXPAND_WARPS[64]
    yield "row_sum_kernel", {}, SUM_WARPS
    yield "router_scores_kernel", {}, 4
    yield "choose_kernel", {}, 1
    yield "sort_slots_kernel", {}, 4
    yield "count_blocks_kernel", {}, 8


def pointer_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name == "to_ptr":
        return "*fp32" if constants["as_deltas"] else HALF[dtype]
    if name in IN_FP32:
        return "*fp32"
    return HALF[dtype] if name in OF_MODEL_DTYPE else "*i32"


def compile_one(name: str, dtype: str, constants: dict[str, Any], warps: int, capability: int) -> dict[str, Any]:
    kernel = getattr(lora_triton, name, None) or getattr(route_triton, name)
    known = {**GROUP, **BY_KERNEL[name], **constants}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in known:
            signature[argument] = "constexpr"
        else:
            signature[argument] = pointer_type(argument, dtype, constants) if argument.endswith("_ptr") else "i32"
    constexprs = {(kernel.arg_names.index(key),): value for key, value in known.items() if key in kernel.arg_names}
    divisible = [
        i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n in ("x_stride", "to_stride")
    ]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in divisible})
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    registers, spills = resources(compiled.asm["cubin"])
    products = set(re.findall(r"(mma\.sync\S+|wgmma\.mma_async\S+|tcgen05\.mma\S+)", compiled.asm["ptx"]))
    return {
        "kernel": name,
        "capability": capability,
        "dtype": dtype,
        **constants,
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "instructions": sorted(products),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory, which hold what did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.findall(r"REG:(\d+)", report)[-1]), int(re.findall(r"STACK:(\d+)", report)[-1])


def main() -> None:
    dtypes, capabilities = sys.argv[1].split(","), [int(name) for name in sys.argv[2:]]
    wanted = [(dtype, one, capability) for dtype in dtypes for one in configurations() for capability in capabilities]
    found = [compile_one(name, dtype, *rest, capability) for dtype, (name, *rest), capability in wanted]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
