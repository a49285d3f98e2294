"""Climbs from an operator's definition to its fastest kernel, on one layer: what each step brought.

The steps are the algorithms of every backend that can run here, the plainest first. The emulator and Triton's
interpreter prove kernels without a GPU and say nothing about their speed: they run on a tiny layer, untimed.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from . import UserError
from ._model import LAYOUTS, warn_if_busy
from .bench import suite


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", help="the operator")
    add("--layer", help='such as "landmarks/240@28 k5" (default: the operator\'s own)')
    add(
        "--passes",
        nargs="+",
        choices=("forward", "backward"),
        default=("forward",),
        help="which (default: forward)",
    )
    add(
        "--layout",
        choices=LAYOUTS,
        help="of the tensors; nhwc: channels_last (default: one that all the operator's algorithms serve)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--batch", type=int, default=4, help="images (default: 4)")
    add("--rounds", type=int, default=20, help="turns of each step (default: 20)")
    add("--seconds", type=float, default=8.0, help="longest time for all rounds, after three (default: 8)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from fastconv import ceilings

    harness = suite("harness")
    console = Console()
    try:
        benchmark = harness.load(args.op)
        layers = harness.layers(args.op, [args.layer or benchmark.ladder], args.batch)
        if not layers:
            raise ValueError(f"--layer must be one of {args.op}, got {args.layer!r}")
    except ValueError as error:
        raise UserError(str(error)) from None
    warn_if_busy(console, torch.get_num_threads())
    try:
        limits = ceilings.measure(args.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    layout = args.layout or benchmark.ladder_layout
    steps = climb(harness, args.op, args.device, layout)
    refused = []
    for direction in args.passes:
        problem = harness.Problem(benchmark, layers[0], direction, getattr(torch, args.dtype), args.device)
        with console.status(f"{problem}, {len(steps)} steps"):
            group = problem.measure(steps, rounds=args.rounds, seconds=args.seconds, ceilings=limits)
            proven = untimed(harness, problem, layout)
        console.print(table(group, limits))
        for name, reason in group["left_out"].items():
            console.print(f"left out: {name}: {reason}", style="dim", markup=False)
        right = [entry["kernel"] for entry in proven if not (entry["refused"] or entry["left_out"])]
        if right:
            console.print(f"right on a tiny layer, not timed: {', '.join(right)}")
        refused += [entry for entry in group["contenders"] + proven if entry["refused"]]
    for entry in refused:
        console.print(f"{entry['name']}: {entry['refused']}", style="red", markup=False)
    return 1 if refused else 0


def climb(harness, op: str, device: str, layout: str) -> list:
    """The definition, then each backend's algorithms, the plainest first; PyTorch's own kernel to compare."""
    from fastconv import backends

    def steps(name: str) -> list:
        algorithms = backends.CHOICES[op].algorithms[name] or (None,)
        plainest_first = harness.load(op).ladder_steps.get(name, algorithms[::-1])
        return [harness.Contender("fastconv", layout, name, algorithm) for algorithm in plainest_first]

    timed = [name for name in backends.available(op, device) if name not in (*_not_timed(device), "aten")]
    compiled = [name for name in timed if name != "reference"]
    found = steps("reference")
    for name in compiled:
        found += steps(name)
    return [*found, harness.Contender("torch", layout)]


def _not_timed(device: str) -> tuple[str, ...]:
    from fastconv import backends

    interpreted = backends.triton_interpreted() or device == "cpu"
    return ("emulator", "triton") if interpreted else ("emulator",)


def untimed(harness, problem, layout: str) -> list[dict]:
    """The emulated and interpreted kernels, checked on the operator's tiny layer."""
    from fastconv import backends

    op, device = problem.benchmark.op, problem.device
    steps = [
        harness.Contender("fastconv", layout, name, algorithm)
        for name in backends.available(op, device)
        if name in _not_timed(device)
        for algorithm in reversed(backends.CHOICES[op].algorithms[name])
    ]
    tiny = harness.Layer("tiny", "tiny", problem.benchmark.tiny)
    return dataclasses.replace(problem, layer=tiny).check(steps)


def table(group: dict, limits):
    """The ladder for ``rich``: time, speed, share of the limit, gain over the step before and in all."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    batch = group["sizes"]["batch"]
    title = f"{group['network']}/{group['layer']}, batch {batch}, {group['pass']}, {group['dtype']}"
    caption = (
        f"limit: {group['floor_seconds'] * 1e3:.3f} ms, set by {group['bound']}; "
        f"{limits.flops_per_second / 1e9:.0f} GFLOP/s, {limits.bytes_per_second / 1e9:.0f} GB/s, "
        f"{limits.threads} threads\n"
        "% limit: limit / ms; gain: over the step before; in all: over the first step"
    )
    shown = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    shown.add_column("step", no_wrap=True)
    for name in ("ms", "GFLOP/s", "% limit", "gain", "in all"):
        shown.add_column(name, justify="right", no_wrap=True)
    first = before = None
    for entry in group["contenders"]:
        if entry["refused"]:
            shown.add_row(f"{entry['kernel']}: refused", style="red")
            continue
        seconds = entry["seconds"]
        first = first or seconds
        if entry["side"] == "torch":
            shown.add_section()
        gains = ("" if before is None else f"{before / seconds:.2f}", f"{first / seconds:.1f}")
        speed = (f"{seconds * 1e3:.3f}", f"{entry['gflops']:.1f}", f"{entry['percent_of_limit']:.0f}")
        shown.add_row(entry["kernel"], *speed, *gains)
        before = seconds
    return shown
