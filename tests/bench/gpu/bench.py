"""All GPU records in one command: correctness first, then speed, in under ten minutes on one H200.

Needs torch, triton, transformers, safetensors and numpy, and a plain copy of the repository; PEFT is used where it is
installed. The model is of Llama-3.1-8B's shape with random weights in bfloat16. Prints a table and, last, one line of
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checkout
import record_ceilings
import record_cold
import record_crowd
import record_decode
import record_host
import record_mixture
import record_peft
import record_prefill
import torch
import transformers
from context import Context, choose, on_device
from correctness import WrongResults, check
from record import Record, missing, table

RECORDS: dict[str, tuple[Callable[[Context], Iterable[Record]], float]] = {
    "ceilings": (record_ceilings.run, 15.0),
    "decode": (record_decode.run, 75.0),
    "mixture": (record_mixture.run, 40.0),
    "cold": (record_cold.run, 25.0),
    "crowd": (record_crowd.run, 160.0),
    "prefill": (record_prefill.run, 25.0),
    "host": (record_host.run, 40.0),
    "peft": (record_peft.run, 50.0),
}
"""Each with the seconds that it should take at most; what would not end before the deadline is left out and named."""


def describe(context: Context) -> dict[str, Any]:
    """The machine, the versions and the code."""
    found = subprocess.run(
        ["git", "-C", str(checkout.ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    is_cuda = context.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(context.device) if is_cuda else platform.processor() or "cpu",
        "dtype": str(context.dtype).removeprefix("torch."),
        "model": context.shape.name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stand_ins": checkout.STANDINS,
        "commit": found.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def measure(context: Context, names: list[str], overall: float) -> tuple[list[Record], dict[str, float]]:
    """The records by name, and the seconds each took."""
    records: list[Record] = []
    took: dict[str, float] = {}
    for name in names:
        run, seconds = RECORDS[name]
        if time.monotonic() + seconds > overall:
            records.append(missing(name, "out of time"))
            continue
        context.limit_to(seconds, overall)
        started = time.monotonic()
        try:
            for record in run(context):
                records.append(record)
                print(f"  {record.name}: {record.measured} {record.unit}", file=sys.stderr, flush=True)
        except Exception as error:
            traceback.print_exc()
            records.append(missing(name, f"{type(error).__name__}: {str(error)[:120]}"))
            context.close()
        took[name] = time.monotonic() - started
        print(f"{name}: {took[name]:.1f} s", file=sys.stderr, flush=True)
        gc.collect()
    return records, took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "plain"])
    parser.add_argument("--tiny", action="store_true", help="a small shape and few samples: whether everything runs")
    parser.add_argument("--only", nargs="*", choices=list(RECORDS), help="these records alone")
    parser.add_argument("--seconds", type=float, default=570.0, help="after which no further record is begun")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    started = time.monotonic()
    overall = started + arguments.seconds
    device, dtype = on_device(arguments.device)
    shape, scale = choose(arguments.tiny)
    context = Context(device, dtype, shape, scale, arguments.kernels)
    result: dict[str, Any] = {"benchmark": "gpu", "machine": describe(context)}
    try:
        checks = check(device, dtype, arguments.kernels)
    except WrongResults as error:
        print(f"wrong results, so no speed: {error}", file=sys.stderr)
        _print(result | {"wrong": str(error)}, arguments.out)
        return 1
    print(f"correctness: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    names = arguments.only or list(RECORDS)
    if "ceilings" not in names:
        names = ["ceilings", *names]
    records, took = measure(context, names, overall)
    context.close()
    if arguments.tiny or device.type != "cuda":
        records = [replace(one, aim=None) for one in records]  # they are for the full shape on a GPU
    print(table([*checks, *records]))
    result |= {"seconds": round(time.monotonic() - started, 1), "seconds_of": {k: round(v, 1) for k, v in took.items()}}
    result["records"] = [one.as_json() for one in [*checks, *records]]
    _print(result, arguments.out)
    return 0


def _print(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    raise SystemExit(main())
