"""Adapters beyond the pool, and beyond memory: ``quarter`` and ``tenthousand``, one record each.

``quarter``: time to the first token where the pool holds a quarter of the adapters in use, beside a pool that holds
them all. ``tenthousand``: throughput and memory where each of 10,000 adapters is asked for, beside the same trace over
100 of them. Answers are compared first; if they differ, no speed is printed. Files that were read or written lately lie
in the operating system's cache. The last line of standard output is the record as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiers_many
import tiers_quarter
from machine import describe
from tiers_model import SIZES
from tiers_trace import Lengths

FOLDER = Path(__file__).resolve().parents[2] / ".benchmarks" / "tiers"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    module: Any = tiers_quarter if args.record == "quarter" else tiers_many
    run = _quarter(args) if args.record == "quarter" else _many(args)
    try:
        record = module.measure(run)
    except AssertionError as error:
        print(f"the engine is wrong: {error}; no speed is printed")
        return 1
    print("\n".join(module.lines_of(record)))
    print(json.dumps({"machine": describe(), "record": args.record, **record}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    records = parser.add_subparsers(dest="record", required=True)
    quarter = records.add_parser("quarter", help="time to the first token with a quarter of the adapters in the pool")
    quarter.add_argument("--seconds", type=float, default=20.0, help="of the trace in each turn")
    quarter.add_argument("--rounds", type=int, default=6, help="turns of each line")
    quarter.add_argument("--load", type=float, default=0.55, help="share of what the pool of all adapters carries")
    quarter.add_argument(
        "--exponents", type=float, nargs="*", default=[1.0, 0.0], help="of the power laws; 0 is uniform"
    )
    many = records.add_parser("tenthousand", help="throughput and memory with 10,000 adapters in use")
    many.add_argument("--requests", type=int, default=10_000)
    many.add_argument("--few", type=int, default=100, help="adapters of the trace that it is compared with")
    many.add_argument("--slices", type=int, default=10, help="turns of each trace")
    many.add_argument("--profile", action="store_true", help="the step loop's functions, too")
    many.add_argument("--loader-threads", type=int)
    for one, base, adapters, lengths in ((quarter, "0.37b", 32, (32, 4)), (many, "small", 10_000, (64, 32))):
        one.add_argument("--base", choices=list(SIZES), default=base)
        one.add_argument("--adapters", type=int, default=adapters)
        one.add_argument("--prompt", type=int, default=lengths[0], help="tokens, on average")
        one.add_argument("--out", type=int, default=lengths[1], help="tokens, on average")
        one.add_argument("--in-flight", type=int, default=8 if one is quarter else 64)
        one.add_argument("--threads", type=int, help="of operators")
        one.add_argument("--inline", action="store_true", help="all engines in this process: quicker to try")
        one.add_argument("--folder", type=Path, default=FOLDER, help="of the base and the adapters; written once")
    return parser


def _quarter(args: argparse.Namespace) -> tiers_quarter.QuarterRun:
    return tiers_quarter.QuarterRun(
        root=args.folder,
        base=args.base,
        adapters=args.adapters,
        lengths=Lengths(args.prompt, args.out),
        load=args.load,
        in_flight=args.in_flight,
        seconds=args.seconds,
        rounds=args.rounds,
        exponents=tuple(args.exponents),
        threads=args.threads,
        inline=args.inline,
    )


def _many(args: argparse.Namespace) -> tiers_many.ManyRun:
    return tiers_many.ManyRun(
        root=args.folder,
        base=args.base,
        adapters=args.adapters,
        few=min(args.few, args.adapters),
        requests=args.requests,
        lengths=Lengths(args.prompt, args.out, vary=True),
        in_flight=args.in_flight,
        slices=args.slices,
        threads=args.threads,
        inline=args.inline,
        loader_threads=args.loader_threads,
        with_profile=args.profile,
    )


if __name__ == "__main__":
    sys.exit(main())
