"""The records of a GPU run from a plain copy of the repository with few packages, and reckon as they say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench" / "gpu"
ABSENT = (
    "msgspec structlog psutil pydantic pydantic_core pydantic_settings fastapi starlette uvicorn zmq orjson rich typer"
    " jinja2 openai prometheus_client peft accelerate hypothesis"
)

HIDE = f"""
import runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT.split()!r}
        return None if absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

kept = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", type(f).__name__)]
sys.meta_path[:] = [Hiding(f) for f in kept]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(name: str, *arguments: str, hide: bool, root: Path = ROOT) -> str:
    """Standard output of a script of a copy of the repository."""
    script = str(root / "tests" / "bench" / "gpu" / name)
    command = [sys.executable, *(("-c", HIDE) if hide else ()), script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env=environment, cwd=root.parent
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def plain_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copies") / "loraplex"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("server", "memory", "kernels", "clients", "tests/bench"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def smoke(plain_copy: Path) -> dict[str, Any]:
    """The record of a tiny run with few packages."""
    out = plain_copy.parent / "record.json"
    printed = run_script("bench.py", "--tiny", "--device", "cpu", "--out", str(out), hide=True, root=plain_copy)
    record: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert json.loads(out.read_text()) == record
    return record


def test_a_tiny_run_needs_few_packages_and_little_time(smoke: dict[str, Any]) -> None:
    assert set(smoke["machine"]["stand_ins"]) == {"msgspec", "structlog", "psutil"}
    assert smoke["seconds"] < 200, "a tiny run takes about ten seconds on a machine that has nothing else to do"


def test_a_tiny_run_has_every_record(smoke: dict[str, Any]) -> None:
    failed = {one["name"]: one["reason"] for one in smoke["records"] if one["measured"] is None}
    assert failed == {"transformers + PEFT decode step": "peft is not installed"}
    names = " ".join(one["name"] for one in smoke["records"])
    for part in (
        "base decode",
        "LoRA decode",
        "resident adapters",
        "kernels alone",
        "MixLoRA",
        "cold",
        "prefill",
        "host",
    ):
        assert part in names
    (crowd,) = (one for one in smoke["records"] if "tokens a second" in one["name"])
    assert crowd["details"]["all_touched"]


def test_correctness_comes_first(smoke: dict[str, Any]) -> None:
    assert smoke["records"][0]["name"].startswith("largest relative difference")
    assert smoke["records"][0]["met"]
    assert smoke["records"][1]["measured"] == 0


def test_peers_are_measured_where_peft_is() -> None:
    printed = run_script("bench.py", "--tiny", "--device", "cpu", "--only", "peft", hide=False)
    names = [one["name"] for one in json.loads(printed.splitlines()[-1])["records"]]
    assert "transformers + PEFT, one r16 adapter, batch 1" in names
    assert any("by adapter_names" in name for name in names)


def test_work_is_counted_without_a_gpu() -> None:
    record = json.loads(run_script("work.py", "--tiny", hide=False).splitlines()[-1])
    assert record["worst"]["launched_over_useful"] <= 1.3
    assert record["worst"]["decode_bytes_over_once"] <= 1.15
    (one,) = (
        count for count in record["counts"] if (count["mix"], count["ranks"], count["rows"]) == ("distinct", "16", 16)
    )
    widths = 8192 + 2 * 5120 + 8192 + 3 * 18432  # inputs and outputs of q, k and v, o, and gate, up, down
    assert one["adapter_once"] == one["adapter_loaded"] == 16 * 32 * 16 * 2 * widths
    assert one["kv_pages"] == 16 * 64
    assert one["kv_bytes"] == 16 * 1024 * 32 * 2 * 8 * 128 * 2


def load(name: str) -> ModuleType:
    """A module of the benchmark that imports no other."""
    spec = importlib.util.spec_from_file_location(f"bench_gpu_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    return load("costs")


def test_a_decode_step_reads_the_weights_and_each_sequences_keys_once(costs: ModuleType) -> None:
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    work = costs.decode_work(costs.LLAMA_8B, 16, 1024, 2)
    assert work.num_bytes == 2 * (weights + 16 * 1024 * 32 * 2 * 8 * 128)
    assert work.flops == 16 * (2 * weights + 4 * 1024 * 32 * 4096)
    one = costs.decode_work(costs.LLAMA_8B, 1, 1024, 2)
    assert one.floor(costs.Ceilings(4.3e12, 790e12, 55e9)) == pytest.approx(3.52e-3, rel=0.01)


def test_adapters_are_counted_by_what_is_read_of_them(costs: ModuleType) -> None:
    shape = costs.LLAMA_8B
    assert shape.lora_parameters(16) == 32 * 16 * 81920
    assert shape.lora_parameters(8, ("q_proj",)) == 32 * 8 * 8192
    mixture = shape.mixture_parameters(16, 8, 2, 2)
    assert mixture == 32 * (16 * 26624 + 2 * 16 * 55296 + 8 * 4096 * 2)
    with_one = costs.decode_work(shape, 1, 1024, 2, shape.lora_parameters(16))
    assert with_one.num_bytes - costs.decode_work(shape, 1, 1024, 2).num_bytes == 2 * shape.lora_parameters(16)


def test_long_prompts_are_bound_by_products(costs: ModuleType) -> None:
    ceilings = costs.Ceilings(4.3e12, 790e12, 55e9)
    work = costs.prefill_work(costs.LLAMA_8B, 2048, 2)
    assert work.floor(ceilings) == work.flops / 790e12
    assert work.flops == pytest.approx(2 * 2048 * 6.979e9, rel=0.05)


def test_a_record_knows_whether_its_aim_is_met() -> None:
    record = load("record")
    slow = record.Record(name="step", measured=4.0, unit="ms", floor=2.0, aim=3.0)
    assert slow.met is False
    assert slow.share_of_floor == 0.5
    high = record.Record(name="share", measured=0.8, unit="", floor=1.0, aim=0.7, higher_is_better=True)
    assert high.met is True
    assert high.share_of_floor == 0.8
    none = record.missing("step", "out of time")
    assert none.met is None
    assert "not measured: out of time" in record.table([none])
