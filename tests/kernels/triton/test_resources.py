"""Compiled for sm_80, sm_90, sm_100: no kernel spills, and each leaves room for enough of its programs at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.without_gpu("kernels are compiled ahead of time, for GPUs that need not be there")

Records = list[dict[str, Any]]

REGISTERS = {
    "_decode_splits": 168,
    "_combine_splits": 80,
    "_prefill_tiles": 255,
    "_rope_write": 64,
    "_norm_row": 64,
    "_silu_mul": 32,
}
"""Of a thread. 168 are three programs of four warps on a multiprocessor, 255 one of eight."""

SHARED = {"_combine_splits": 4096, "_prefill_tiles": 135_168, "_rope_write": 1024, "_norm_row": 1024, "_silu_mul": 0}
"""Bytes of a program; decoding has its own constant."""


def test_no_kernel_spills(compilation_records: Records) -> None:
    assert not [record for record in compilation_records if record["spills"]]


def test_registers_keep_to_their_budget(compilation_records: Records) -> None:
    assert not [record for record in compilation_records if record["registers"] > REGISTERS[record["kernel"]]]


def test_shared_memory_keeps_to_its_budget(compilation_records: Records, kernels: SimpleNamespace) -> None:
    budget = SHARED | {"_decode_splits": kernels.decode.SHARED_BYTES}
    assert not [record for record in compilation_records if record["shared"] > budget[record["kernel"]]]


def test_every_kernel_is_compiled_for_every_target(compilation_records: Records) -> None:
    for target in (80, 90, 100):
        found = [record for record in compilation_records if record["target"] == target]
        assert {record["kernel"] for record in found} == set(REGISTERS)
        assert {record["compiled_for"] for record in found} == {target}


def test_prefill_runs_on_the_matrix_instructions_of_its_gpu(compilation_records: Records) -> None:
    wide = [
        record
        for record in compilation_records
        if record["kernel"] == "_prefill_tiles" and "float32" not in record["case"]
    ]
    assert all(record["wgmma"] for record in wide if record["target"] == 90)
    assert all(record["tcgen05"] for record in wide if record["target"] == 100)
