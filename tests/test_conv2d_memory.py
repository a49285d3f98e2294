"""How much memory a convolution takes beside its tensors, by what the system says of a process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Run, runs
from convolutions import Convolution

# Measures the cases that it reads. Its large blocks come from the system one by one and go back when they are
# freed; so the most pages it ever held, less those before the call, are what the call took at once.
PROBE = """
import ctypes, json, sys
import torch
import fastconv

def kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def peak(call):
    call()  # loads code, starts threads
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak
    before = kib("VmRSS")
    result = call()
    return 1024 * (kib("VmHWM") - before), result

torch.set_num_threads(2)
for line in sys.stdin:
    backend, algorithm, channels_last, backward, image, weight, groups = json.loads(line)
    x, w = torch.randn(image), torch.randn(weight)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    def forward():
        return fastconv.conv2d(x, w, None, 1, 1, 1, groups, backend=backend, algorithm=algorithm)
    if backward:
        for tensor in (x, w):
            tensor.requires_grad_()
        y = forward()
        grad = torch.randn_like(y)
        used, result = peak(lambda: torch.autograd.grad(y, (x, w), grad, retain_graph=True))
        used -= sum(tensor.nbytes for tensor in result)
    else:
        used, result = peak(forward)
        used -= result.nbytes
    print(used, flush=True)
"""
MIB = 2**20
SLACK = MIB  # the system counts pages by dozens for each thread; a call may pack the weight, and keeps it

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the most pages of a process"
)

DENSE = Convolution((4, 64, 56, 56), 64, padding=1, bias=False)
LAYERS = [DENSE, DENSE.replace(input=(4, 128, 56, 56), filters=128, groups=32)]
# plain keeps nothing, and would take the time of all others
RUNS = [run for run in runs("conv2d", own=True) if run.backend == "cpu" and run.algorithm != "plain"]
BATCHES = (2, 16)


def cases(run: Run) -> list[tuple[Convolution, bool, bool]]:
    """(call, channels_last, backward) of all that an algorithm serves."""
    return [
        (layer.replace(input=(batch, *layer.input[1:])), layout == "channels_last", backward)
        for layer in LAYERS
        for batch in BATCHES
        for layout in ("contiguous", "channels_last")
        if layer.serves(run, layout=layout)
        for backward in (False, True)
    ]


def measure(run: Run, cases: list[tuple[Convolution, bool, bool]]) -> list[int]:
    """Bytes that each call of an algorithm took at most, without its results."""
    lines = [
        json.dumps([*run, channels_last, backward, call.input, call.weight, call.groups])
        for call, channels_last, backward in cases
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(lines),
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_less_than_twice_the_output(run):
    """Whatever the batch: no matrix of columns, and no transformed images."""
    todo = cases(run)
    for (call, channels_last, backward), used in zip(todo, measure(run, todo), strict=True):
        output = 4 * math.prod(call.output)
        assert used <= 2 * output + SLACK, (
            f"{call}, channels_last={channels_last}, backward={backward}: {used / MIB:.1f} MiB, "
            f"the output has {output / MIB:.1f}"
        )


def test_a_matrix_of_columns_is_seen():
    """The measurement itself: ``unfold`` keeps all columns, 9 times the images."""
    (used,) = measure(Run("aten", "unfold"), [(DENSE, False, False)])
    assert used > 8 * 4 * math.prod(DENSE.input)
