"""conv_transpose2d against ``torch.nn.functional.conv_transpose2d``."""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark
from .windows import taps_inside


def tensors(sizes, generator):
    image = (sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])
    weight = torch.randn(
        sizes["channels"], sizes["filters"], sizes["kernel"], sizes["kernel"], generator=generator
    )
    taps = max(1, sizes["kernel"] // sizes["stride"]) ** 2  # that reach an output
    return torch.randn(image, generator=generator), weight / (sizes["channels"] * taps) ** 0.5


def reference(sizes, input, weight):
    """PyTorch's, for the definition adds the whole output once for each tap, and FCN-32s has 4096.

    ``tests/test_conv_transpose2d.py`` holds one against the other.
    """
    return peer(sizes, input, weight)


def ours(sizes, input, weight, backend=None, algorithm=None):
    return fastconv.conv_transpose2d(
        input, weight, None, sizes["stride"], sizes["padding"], backend=backend, algorithm=algorithm
    )


def peer(sizes, input, weight):
    return torch.nn.functional.conv_transpose2d(input, weight, None, sizes["stride"], sizes["padding"])


def macs(sizes):
    return _pairs(sizes) * sizes["height"] * sizes["width"] * sizes["kernel"] ** 2


def macs_inside(sizes):
    """Without the products that padding cuts off."""
    kernel, stride, padding = sizes["kernel"], sizes["stride"], sizes["padding"]
    rows, columns = (
        taps_inside(size, (size - 1) * stride - 2 * padding + kernel, kernel, stride, padding)
        for size in (sizes["height"], sizes["width"])
    )
    return _pairs(sizes) * rows * columns


def _pairs(sizes):
    """Of a channel and a filter, in all images."""
    return sizes["batch"] * sizes["channels"] * sizes["filters"]


BENCHMARK = Benchmark(
    op="conv_transpose2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=macs,
    macs_inside=macs_inside,
    ladder="landmarks/256-128@28 k4 s2",
    tiny={
        "batch": 1,
        "channels": 4,
        "filters": 6,
        "height": 4,
        "width": 5,
        "kernel": 4,
        "stride": 2,
        "padding": 1,
    },
    ladder_layout="nchw",
    ladder_steps={
        "cpu": ("plain", "im2col", "direct", "grouped", "winograd_f2", "winograd_f4", "winograd_f6"),
        "cuda": ("direct", "im2col", "implicit_gemm"),
    },
    slow=("plain",),
    rounding={"winograd_f6": 4.0},  # its points lie far out: more cancels
)


def test_conv_transpose2d(contest):
    contest()
