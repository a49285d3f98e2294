"""A small set of shapes through every compiled GPU kernel: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize

Odd sizes, so that every tile has an edge; both layouts, both passes, full and half precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fastconv import backends

from .harness import LAYOUTS, PASSES, Contender, Layer, Problem, load, operators


def sizes(tiny: dict[str, int]) -> list[dict[str, int]]:
    """An operator's tiny sizes, and ones that cross the edges of tiles and of channel blocks."""
    found = [tiny]
    if "kernel" in tiny:
        first, second = (channels * tiny.get("groups", 1) for channels in (35, 67))
        found += [
            {**tiny, "batch": 2, "channels": first, "height": 19, "width": 37, "kernel": 5, "padding": 2},
            {**tiny, "batch": 2, "channels": second, "height": 33, "width": 18, "stride": 2},
        ]
    return found


def run(device: str, names: Sequence[str]) -> list[str]:
    """Runs and checks all of it; returns what was wrong."""
    wrong = []
    for op in operators():
        benchmark = load(op)
        kernels = [
            (name, algorithm)
            for name in backends.available(op, device)
            if name in names
            for algorithm in backends.CHOICES[op].algorithms[name] or (None,)
        ]
        contenders = [Contender("fastconv", layout, *kernel) for kernel in kernels for layout in LAYOUTS]
        for row in sizes(benchmark.tiny):
            for direction in PASSES:
                for dtype in (torch.float32, torch.float16):
                    problem = Problem(benchmark, Layer("sanitize", str(row), row), direction, dtype, device)
                    for entry in problem.check(contenders):
                        outcome = entry["refused"] or entry["left_out"] or "ok"
                        print(f"{op} {direction} {dtype} {entry['name']}: {outcome}")
                        if entry["refused"]:
                            wrong.append(entry["name"])
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda"])
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU; --device cpu --backends cpu checks the script", file=sys.stderr)
        return 2
    if not any(set(backends.available(op, args.device)) & set(args.backends) for op in operators()):
        print(f"none of {args.backends} can run here", file=sys.stderr)
        return 2
    return 1 if run(args.device, args.backends) else 0


if __name__ == "__main__":
    sys.exit(main())
