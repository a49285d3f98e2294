"""``bench models``: whole networks, each row written as it comes."""

from __future__ import annotations

import argparse
import sys
import time

from .._format import progress_bars
from . import UserError
from .bench import ceilings_here, suite


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    networks, report, results = (suite(name) for name in ("networks", "network_report", "results"))
    from benchmarks import engines
    from benchmarks.report import doubts, left_out, refusals

    if args.device != "cpu" or args.dtype != "float32" or args.backends:
        raise UserError("whole networks are measured with --device cpu --dtype float32 and no --backends")
    try:
        batches = args.batch or networks.BATCHES
        problems = networks.problems(args.shapes, batches, args.passes, image=args.image)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not problems:
        raise UserError(f"nothing is measured of {args.shapes} in --passes {' '.join(args.passes)}")
    console = Console()
    ceilings = ceilings_here(args, console)
    groups: list[dict] = []

    def result() -> dict:
        found = results.collect(report.OP, groups, ceilings, args.dtype, args.device_name)
        return {**found, "versions": {**found["versions"], **engines.versions()}}

    try:
        if args.json or args.save:
            results.with_earlier(result(), args.json)
    except ValueError as error:
        raise UserError(str(error)) from None
    start, interrupted = time.perf_counter(), False
    with progress_bars(console) as progress:
        task = progress.add_task("", total=len(problems))
        try:
            for done, problem in enumerate(problems, 1):
                group = problem.measure(
                    networks.contenders(problem.direction, quick=args.quick),
                    rounds=args.rounds,
                    seconds=args.seconds,
                    ceilings=ceilings,
                    progress=lambda what: progress.update(task, description=what),
                )
                groups.append({**group, **results.moment()})
                if args.json or args.save:
                    path = results.save(results.with_earlier(result(), args.json), args.json)
                seconds = time.perf_counter() - start
                if not console.is_terminal:
                    line = f"{done} of {len(problems)}, {seconds:.0f} s: {problem}"
                    print(line, file=sys.stderr, flush=True)
                progress.advance(task)
                if args.within and seconds > args.within:
                    console.print(f"stopped after {done} of {len(problems)}: --within {args.within:g}")
                    break
        except KeyboardInterrupt:
            if not groups:
                raise
            interrupted = True
    found = result()
    print(report.console(found, max(100, console.width)))  # as it is: a narrow terminal would break its lines
    for line in left_out(found):
        console.print(f"left out: {line}", style="dim", markup=False)
    for doubt in doubts(found):
        console.print(doubt, style="yellow", markup=False)
    if args.json or args.save:
        console.print(f"raw results: {path}")
    refused = refusals(found)
    for line in refused:
        console.print(f"refused: {line}", style="red", markup=False)
    if interrupted:
        console.print(f"interrupted: partial, {len(groups)} of {len(problems)}", style="yellow")
        return 130
    return int(bool(refused))
