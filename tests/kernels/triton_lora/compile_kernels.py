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

from loraplex.kernels import lora_expand, lora_triton
from loraplex.kernels.lora_operators import COUNT_TILES, COUNT_WARPS, PARTIAL_BLOCK, SUM_COLUMNS, SUM_WARPS
from loraplex.kernels.lora_tuning import EXPAND, SHRINK

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GROUP = {"first_site": 0, "table_sites": 7, "out_0": 4096, "out_1": 1024, "out_2": 1024}
PLACES = {"page_chunks": 256, "striped": False, "wide": False, "num_sites": 3}
DOWN = {"num_sites": 1, "out_0": 4096, "out_1": 0, "out_2": 0}
SHRINK_4096 = {"in_features": 4096, "splits": 8, "split_chunks": 4, **PLACES}
SHRINK_14336 = {**SHRINK_4096, "in_features": 14336, "splits": 28, **DOWN}
FACTS = (0, 16, 32, 8, 8, 3, 16, 32, 0, 0, 4, 16, 112, 112, 0, 6, 16, 32, 0, 0, 0, 16, 1002, 0, 0, 1, 16, 32, 0, 0)
COUNT = {"facts": FACTS, "layer_groups": 4, "all_groups": 6, "groups": 4}
HALF = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
OF_MODEL_DTYPE = {"x_ptr", "chunks_ptr", "base_ptr", "bias_ptr", "y_ptr"}
IN_FP32 = {"low_ptr", "summed_ptr", "deltas_ptr", "scales_ptr", "weights_ptr"}
VALUES = {
    "low_part": 4096,
    "low_stride": 64,
    "x_stride": 4096,
    "to_stride": 6144,
    "base_stride": 6144,
    "y_stride": 6144,
    "deltas_stride": 6144,
    "num_layers": 32,
    "layer_chunks": 0,
}
"""Integers of a launch, as Triton compiles for what it sees of them: whether they are 1, or multiples of 16."""


def configurations(bits: int) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """(kernel, constants, warps, stages) of the launches that ``lora_operators.py`` makes, for all that is tuned."""
    for (its_bits, _, width, block_rows), shrink in SHRINK.items():
        if its_bits == bits:
            parts = 1 if block_rows == 64 else 28 if width > 8192 else 8
            known = SHRINK_14336 if parts == 28 else SHRINK_4096
            block = {"rows": shrink.rows, "block_ranks": shrink.ranks}
            block |= {"block_chunks": shrink.chunks, "parts": parts}
            yield "shrink_kernel", {**known, **block}, shrink.warps, shrink.stages
    for (its_bits, _, _, block_rows), expand in EXPAND.items():
        if its_bits == bits:
            block = {"rows": expand.rows, "block_ranks": expand.ranks}
            block["block_columns"] = expand.columns
            for flags in FLAGS if block_rows == 16 else FLAGS[-1:] if block_rows == 256 else FLAGS[:1]:
                yield "expand_kernel", {**PLACES, **block, **flags}, expand.warps, expand.stages
    if bits == 16:
        yield from plain_kernels()


FLAGS: tuple[dict[str, Any], ...] = (
    {"as_deltas": False, "base_by_slot": False, "gains": False, "biased": False, "parts": 1},
    {"as_deltas": False, "base_by_slot": False, "gains": True, "biased": True, "parts": 8},
    {"as_deltas": True, "base_by_slot": True, "gains": True, "biased": True, "parts": 28},
)


def plain_kernels() -> Iterator[tuple[str, dict[str, Any], int, int]]:
    lookup = {"in_features": 128256, "rows": 64, "block_ranks": 16, "num_sites": 1}
    yield "lookup_kernel", {"page_chunks": 256, "striped": True, **lookup}, 4, 3
    yield "sum_partial_kernel", {"parts": 28, "block": PARTIAL_BLOCK}, 4, 3
    yield "row_sum_kernel", {"block_columns": SUM_COLUMNS}, SUM_WARPS, 3
    yield "count_work_kernel", {**COUNT, "block": COUNT_TILES}, COUNT_WARPS, 3


def pointer_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name == "to_ptr":
        return "*fp32" if constants["as_deltas"] else HALF[dtype]
    if name in IN_FP32:
        return "*fp32"
    return HALF[dtype] if name in OF_MODEL_DTYPE else "*i32"


def compile_one(
    name: str, dtype: str, constants: dict[str, Any], warps: int, stages: int, capability: int
) -> dict[str, Any]:
    kernel = getattr(lora_triton, name, None) or getattr(lora_expand, name)
    known = {**GROUP, **constants}
    # An embedding's input are the tokens, one beside the other.
    values = {**VALUES, "x_stride": 1} if name == "lookup_kernel" else VALUES
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, param in enumerate(kernel.params):
        value = known.get(param.name, None if param.do_not_specialize else values.get(param.name))
        is_pointer = param.name.endswith("_ptr")
        if param.name in known or value == 1:
            signature[param.name] = "constexpr"
            constexprs[(place,)] = value
            continue
        assert is_pointer or param.do_not_specialize or value is not None, param.name
        signature[param.name] = pointer_type(param.name, dtype, constants) if is_pointer else "i32"
        if (is_pointer and not param.do_not_specialize_on_alignment) or (value is not None and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )
    registers, spills = resources(compiled.asm["cubin"])
    products = set(re.findall(r"(mma\.sync\S+|wgmma\.mma_async\S+|tcgen05\.mma\S+)", compiled.asm["ptx"]))
    return {
        "kernel": name,
        "capability": capability,
        "dtype": dtype,
        **{name: value for name, value in constants.items() if name != "facts"},
        "warps": warps,
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
    """The first capability gets every configuration, the others every third."""
    dtypes, capabilities = sys.argv[1].split(","), [int(name) for name in sys.argv[2:]]
    found = []
    for dtype in dtypes:
        distinct: list[tuple[str, dict[str, Any], int, int]] = []
        for one in configurations(32 if dtype == "fp32" else 16):
            if one not in distinct:
                distinct.append(one)
        for capability in capabilities:
            some = distinct if capability == capabilities[0] else distinct[::3]
            found += [compile_one(name, dtype, *rest, capability) for name, *rest in some]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
