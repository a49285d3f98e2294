"""Whole units of networks, in turns: from torch.nn alone, compiled, from fastconv.nn, and that compiled.

    python -m benchmarks.units [--batch 4] [--seconds 6] [--out units.json]

A unit is what its network repeats: ShuffleNet's, and the conv-shift-conv block. All contenders of a unit have
the same weights and calibrated batch norms, and must agree; the figures are medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from fastconv._format import milliseconds, text_table
from fastconv._timing import interleave, keep_freed_memory
from fastconv.cli._model import LAYOUTS
from fastconv.models.shift_resnet import shift_resnet
from fastconv.models.shufflenet_v1 import ShuffleUnit

from . import results

COLUMNS = [
    "unit",
    "mode",
    "torch",
    "torch.compile",
    "fastconv",
    "fastconv compiled",
    "to torch",
    "to compile",
]


def shuffle_unit(channels: int, groups: int, plain: bool) -> nn.Module:
    return ShuffleUnit(channels, channels, 1, groups, False, True, False, plain)


def csc(filters: int, plain: bool) -> nn.Module:
    """The second block of ShiftResNet-20's stage of so many filters, at expansion 3."""
    blocks = [
        block
        for block in shift_resnet(20, 3, plain=plain).modules()
        if hasattr(block, "shortcut") and block.conv2.out_channels == filters
    ]
    return blocks[1]


# name: (unit, by whether it is plain; shape of its input without the batch)
UNITS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, int, int]]] = {
    "ShuffleNet 1x g3, 240@28": (lambda plain: shuffle_unit(240, 3, plain), (240, 28, 28)),
    "ShuffleNet 1x g3, 480@14": (lambda plain: shuffle_unit(480, 3, plain), (480, 14, 14)),
    "ShuffleNet 1x g8, 384@28": (lambda plain: shuffle_unit(384, 8, plain), (384, 28, 28)),
    "CSC x3, 16@32": (lambda plain: csc(16, plain), (16, 32, 32)),
    "CSC x3, 64@8": (lambda plain: csc(64, plain), (64, 8, 8)),
}


def measure(name: str, batch: int, training: bool, seconds: float) -> dict:
    """Median seconds of each contender in each layout."""
    make, shape = UNITS[name]
    input = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    plain, ours = make(True), make(False)
    with torch.no_grad():
        for _ in range(2):
            plain(input)  # running statistics
    ours.load_state_dict(plain.state_dict())
    calls, answers = {}, []
    for layout, memory_format in LAYOUTS.items():
        for side, unit in (("torch", plain), ("fastconv", ours)):
            placed = copy.deepcopy(unit).train(training).to(memory_format=memory_format)
            for suffix, run in (("", placed), (" compiled", torch.compile(placed, dynamic=False))):
                call = step(run, list(placed.parameters()), input.to(memory_format=memory_format), training)
                answers.append(call())
                calls[f"{side}{suffix} {layout}"] = call
    for answer in answers[1:]:  # as a whole: rounding decides on which side of relu's corner a value is
        error = ((answer - answers[0]).norm() / answers[0].norm()).item()
        if not error < 1e-2:
            raise RuntimeError(f"the contenders of {name} disagree by {error:.1e}")
    times = interleave(calls, 50, seconds=seconds)
    return {
        "unit": name,
        "batch": batch,
        "mode": "training" if training else "inference",
        "seconds": {contender: statistics.median(found) for contender, found in times.items()},
    }


def step(unit: Callable, parameters: list, input: torch.Tensor, training: bool) -> Callable[[], torch.Tensor]:
    if not training:

        def forward():
            with torch.no_grad():
                return unit(input)

        return forward
    leaf = input.detach().requires_grad_()
    with torch.no_grad():
        output = unit(leaf)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        grad = torch.empty_like(output).copy_(grad)

    def forward_and_backward():
        return torch.autograd.grad(unit(leaf), [leaf, *parameters], grad)[0]

    return forward_and_backward


def row(found: dict) -> list[str]:
    """The better layout of each contender, and how many times as fast ours is."""

    def best(side: str) -> float:
        return min(found["seconds"][f"{side} {layout}"] for layout in LAYOUTS)

    sides = ("torch", "torch compiled", "fastconv", "fastconv compiled")
    torch_, compiled, ours, ours_compiled = (best(side) for side in sides)
    ratios = (f"{torch_ / ours:.2f}", f"{compiled / min(ours, ours_compiled):.2f}")
    return [found["unit"], found["mode"], *map(milliseconds, map(best, sides)), *ratios]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.units", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each unit and mode")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    found = []
    for name in args.units:
        for training in (False, True):
            torch.compiler.reset()
            found.append(measure(name, args.batch, training, args.seconds))
            print(text_table(COLUMNS, [row(found[-1])]).splitlines()[-1], file=sys.stderr)
    print(text_table(COLUMNS, [row(each) for each in found]))
    if args.out:
        commit, dirty = results.revision()
        facts = {"commit": commit, "uncommitted_changes": dirty, "versions": results.versions()}
        args.out.write_text(
            json.dumps({**facts, "threads": torch.get_num_threads(), "units": found}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
