"""Times an operator's kernels against PyTorch's, in turns, layer by layer of real networks.

Every figure stands beside the machine's limit, which is measured first; a kernel whose result is wrong is
refused. The same suite runs under pytest-benchmark with: pytest benchmarks/

"bench models" times whole networks, inference and training steps, against PyTorch, torch.compile, ONNX
Runtime and OpenVINO (float32, CPU); the engines come with: pip install 'fastconv[engines]'. With --save each
row is written as it comes, and those that the file has of other networks stay.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from .._format import progress_bars
from . import UserError
from ._model import positive, warn_if_busy


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", nargs="?", help='the operator (default: all that have a benchmark), or "models"')
    add(
        "--shapes",
        nargs="+",
        metavar="NET",
        help='networks, layers ("landmarks/144@56 k3"), or all (default; with --quick, landmarks)',
    )
    add("--backends", nargs="+", metavar="NAME", help="only these, such as cpu, emulator, reference")
    passes = ("forward", "backward")
    add("--passes", nargs="+", choices=passes, default=passes, help="which (default: both)")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add(
        "--batch",
        type=_batches,
        metavar="N[,N]",
        help="images, where the shape file does not say (default: 4; of whole networks 1,4)",
    )
    add("--image", type=positive, default=224, help="height and width for whole networks (default: 224)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--rounds", type=int, default=20, help="turns of each contender (default: 20)")
    add(
        "--seconds",
        type=float,
        default=3.0,
        help="longest time for a layer's pass, or for each contender of a network, after three rounds (3)",
    )
    add("--within", type=float, metavar="SECONDS", help="stop after this long, with what is measured by then")
    add("--peers", nargs="+", choices=("torch", "torch.compile"), default=("torch",), help="compare with")
    add("--quick", action="store_true", help="PyTorch and the library's own choice only")
    add("--json", type=Path, metavar="FILE", help="write the raw results to this file (one operator)")
    add("--save", action="store_true", help="write the raw results to benchmarks/results/<device>/")
    add("--device-name", help="the folder's name there (default: made from the processor's)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.op == "models":
        from . import _bench_models

        return _bench_models.run(args)
    suite("harness")
    from benchmarks import harness, report, results

    console = Console()
    try:
        problems_of = {op: _problems(harness, op, args) for op in _operators(harness, args)}
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.json and len(problems_of) > 1:
        raise UserError("--json takes one operator; name it, or use --save")
    ceilings = ceilings_here(args, console)
    refused: list[str] = []
    partial = None
    for op, (problems, contenders) in problems_of.items():
        groups: list[dict] = []
        try:
            for group in measure(problems, contenders, args, ceilings, console):
                groups.append(group)
        except KeyboardInterrupt:
            if not groups:
                raise
            partial = f"interrupted: partial, {len(groups)} of {len(problems)} passes of {op}"
        result = results.collect(op, groups, ceilings, args.dtype, args.device_name)
        console.print(report.table(result))
        refused += report.refusals(result)
        for line in report.left_out(result):
            console.print(f"left out: {line}", style="dim", markup=False)
        for doubt in report.doubts(result):
            console.print(doubt, style="yellow", markup=False)
        if partial is not None:
            console.print(f"{partial}; no raw results are written", style="yellow")
            break
        if args.json or args.save:
            console.print(f"raw results: {results.save(result, args.json)}")
    for line in refused:
        console.print(f"refused: {line}", style="red", markup=False)
    return 130 if partial is not None else int(bool(refused))


def _batches(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def suite(module: str) -> ModuleType:
    """A module of the checkout's ``benchmarks`` folder, which is no part of an installed package.

    Raises:
        UserError: there is no such folder beside the package or here.
    """
    import importlib

    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / "benchmarks/harness.py").exists():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return importlib.import_module(f"benchmarks.{module}")
    raise UserError("the benchmarks are in the repository, not in the package: run this in a checkout of it")


def measure(problems, contenders, args: argparse.Namespace, ceilings, console) -> Iterator[dict]:
    """Measures one problem after the other, as long as ``--within`` allows.

    Under a progress bar; where there is no terminal to draw it, with a line on stderr for each that is done.
    """
    start = time.perf_counter()
    with progress_bars(console) as progress:
        task = progress.add_task("", total=len(problems))
        for done, problem in enumerate(problems, 1):
            progress.update(task, description=str(problem))
            group = problem.measure(contenders, rounds=args.rounds, seconds=args.seconds, ceilings=ceilings)
            if not console.is_terminal:
                seconds = time.perf_counter() - start
                print(f"{done} of {len(problems)}, {seconds:.0f} s: {problem}", file=sys.stderr, flush=True)
            yield group
            progress.advance(task)
            if args.within and time.perf_counter() - start > args.within:
                console.print(f"stopped after {done} of {len(problems)} passes: --within {args.within:g}")
                break


def _operators(harness: ModuleType, args: argparse.Namespace) -> tuple[str, ...]:
    return (args.op,) if args.op else harness.operators()


def _problems(harness: ModuleType, op: str, args: argparse.Namespace):
    benchmark = harness.load(op)
    shapes = args.shapes or (["landmarks"] if args.quick else None)
    batches = args.batch or [4]
    if len(batches) > 1:
        raise ValueError(f"--batch must be one number for an operator, got {batches}")
    contenders = harness.contenders(
        op, args.device, backends_wanted=args.backends, peers=args.peers, quick=args.quick
    )
    return [
        harness.Problem(benchmark, layer, direction, getattr(torch, args.dtype), args.device)
        for layer in harness.layers(op, shapes, batches[0])
        for direction in args.passes
    ], contenders


def ceilings_here(args: argparse.Namespace, console):
    from fastconv import ceilings

    if args.threads:
        torch.set_num_threads(args.threads)
    warn_if_busy(console, torch.get_num_threads())
    try:
        found = ceilings.measure(args.device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    console.print(
        f"{found.device} {found.capability}: {found.flops_per_second / 1e9:.0f} GFLOP/s of float32 "
        f"multiply-adds, {found.bytes_per_second / 1e9:.0f} GB/s of copying"
    )
    return found
