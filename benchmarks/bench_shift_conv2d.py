"""shift_conv2d against PyTorch's depthwise convolution with one 1 in each filter, then its 1x1 one."""

from __future__ import annotations

import torch

import fastconv

from . import bench_shift2d
from .harness import Benchmark
from .windows import outputs


def tensors(sizes, generator):
    weight = torch.randn(sizes["filters"], sizes["channels"], 1, 1, generator=generator)
    return *bench_shift2d.tensors(sizes, generator), weight / sizes["channels"] ** 0.5


def reference(sizes, input, weight):
    return fastconv.shift_conv2d_reference(input, _offsets(sizes), weight, None, sizes["stride"])


def ours(sizes, input, weight, backend=None, algorithm=None):
    return fastconv.shift_conv2d(
        input, _offsets(sizes), weight, None, sizes["stride"], backend=backend, algorithm=algorithm
    )


def peer(sizes, input, weight):
    return torch.nn.functional.conv2d(bench_shift2d.peer(sizes, input), weight, None, sizes["stride"])


def macs(sizes):
    height, width = (outputs(size, 1, sizes["stride"], 0) for size in (sizes["height"], sizes["width"]))
    return sizes["batch"] * sizes["filters"] * sizes["channels"] * height * width


def _offsets(sizes):
    return bench_shift2d.offsets(sizes["channels"], sizes["kernel"])


BENCHMARK = Benchmark(
    op="shift_conv2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=macs,
    macs_inside=macs,
    ladder="landmarks/256@56 k3",
    tiny={"batch": 1, "channels": 9, "filters": 4, "height": 4, "width": 5, "kernel": 3, "stride": 1},
    slow=("plain",),
)


def test_shift_conv2d(contest):
    contest()
