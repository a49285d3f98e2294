"""depthwise_conv2d against ``torch.nn.functional.conv2d(groups=C)``."""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark
from .windows import outputs, taps_inside


def tensors(sizes, generator):
    channels, kernel = sizes["channels"], sizes["kernel"]
    image = (sizes["batch"], channels, sizes["height"], sizes["width"])
    return (
        torch.randn(image, generator=generator),
        torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel,
    )


def reference(sizes, input, weight):
    return fastconv.depthwise_conv2d_reference(input, weight, None, sizes["stride"], sizes["padding"])


def ours(sizes, input, weight, backend=None, algorithm=None):
    return fastconv.depthwise_conv2d(
        input, weight, None, sizes["stride"], sizes["padding"], backend=backend, algorithm=algorithm
    )


def peer(sizes, input, weight):
    return torch.nn.functional.conv2d(
        input, weight, None, sizes["stride"], sizes["padding"], groups=sizes["channels"]
    )


def macs(sizes):
    height, width = (outputs(sizes[axis], *_window(sizes)) for axis in ("height", "width"))
    return sizes["batch"] * sizes["channels"] * height * width * sizes["kernel"] ** 2


def macs_inside(sizes):
    window = _window(sizes)
    rows, columns = (
        taps_inside(outputs(size, *window), size, *window) for size in (sizes["height"], sizes["width"])
    )
    return sizes["batch"] * sizes["channels"] * rows * columns


def _window(sizes):
    return sizes["kernel"], sizes["stride"], sizes["padding"]


BENCHMARK = Benchmark(
    op="depthwise_conv2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=macs,
    macs_inside=macs_inside,
    ladder="landmarks/144@56 k3",
    tiny={"batch": 1, "channels": 4, "height": 6, "width": 5, "kernel": 3, "stride": 1, "padding": 1},
)


def test_depthwise_conv2d(contest):
    contest()
