"""separable_conv2d against PyTorch's depthwise convolution, a ReLU in place, and its 1x1 one."""

from __future__ import annotations

import torch

import fastconv

from . import bench_depthwise_conv2d
from .harness import Benchmark
from .windows import outputs


def tensors(sizes, generator):
    input, depthwise_weight = bench_depthwise_conv2d.tensors(sizes, generator)
    weight = torch.randn(sizes["filters"], sizes["channels"], 1, 1, generator=generator)
    # No sum is near relu's corner, where rounding decides the gradient: every other channel is all zeros.
    bias = 10.0 * (1 - 2 * (torch.arange(sizes["channels"]) % 2))
    return input, depthwise_weight, weight / sizes["channels"] ** 0.5, bias


def reference(sizes, input, depthwise_weight, pointwise_weight, bias):
    return fastconv.separable_conv2d_reference(
        input, depthwise_weight, pointwise_weight, bias, None, *_window(sizes), mid_activation="relu"
    )


def ours(sizes, input, depthwise_weight, pointwise_weight, bias, backend=None, algorithm=None):
    return fastconv.separable_conv2d(
        *(input, depthwise_weight, pointwise_weight, bias, None, *_window(sizes)),
        mid_activation="relu",
        backend=backend,
        algorithm=algorithm,
    )


def peer(sizes, input, depthwise_weight, pointwise_weight, bias):
    window = {"stride": sizes["stride"], "padding": sizes["padding"], "groups": sizes["channels"]}
    middle = torch.nn.functional.conv2d(input, depthwise_weight, bias, **window)
    return torch.nn.functional.conv2d(torch.relu_(middle), pointwise_weight)


def _window(sizes):
    return sizes["stride"], sizes["padding"]


def _macs_of_the_product(sizes):
    window = (sizes["kernel"], *_window(sizes))
    height, width = (outputs(sizes[axis], *window) for axis in ("height", "width"))
    return sizes["batch"] * sizes["filters"] * sizes["channels"] * height * width


def macs(sizes):
    return bench_depthwise_conv2d.macs(sizes) + _macs_of_the_product(sizes)


def macs_inside(sizes):
    return bench_depthwise_conv2d.macs_inside(sizes) + _macs_of_the_product(sizes)


BENCHMARK = Benchmark(
    op="separable_conv2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=macs,
    macs_inside=macs_inside,
    ladder="landmarks/192-32@28 k3",
    tiny={
        "batch": 1,
        "channels": 4,
        "filters": 3,
        "height": 6,
        "width": 5,
        "kernel": 3,
        "stride": 1,
        "padding": 1,
    },
    slow=("plain",),
)


def test_separable_conv2d(contest):
    contest()
