"""depthwise_conv2d against ``torch.nn.functional.conv2d(groups=C)``."""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark


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
    height, width = (_outputs(sizes, axis) for axis in ("height", "width"))
    return sizes["batch"] * sizes["channels"] * height * width * sizes["kernel"] ** 2


def macs_inside(sizes):
    rows, columns = (_taps_inside(sizes, axis) for axis in ("height", "width"))
    return sizes["batch"] * sizes["channels"] * rows * columns


def _outputs(sizes, axis):
    return (sizes[axis] + 2 * sizes["padding"] - sizes["kernel"]) // sizes["stride"] + 1


def _taps_inside(sizes, axis):
    """Pairs of an output and a tap, along one axis, that meet a pixel of the image."""
    starts = (output * sizes["stride"] - sizes["padding"] for output in range(_outputs(sizes, axis)))
    return sum(max(0, min(start + sizes["kernel"], sizes[axis]) - max(start, 0)) for start in starts)


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
