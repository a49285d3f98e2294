"""group_conv2d_shuffle against ``torch.nn.functional.conv2d`` and then ``channel_shuffle``."""

from __future__ import annotations

import torch

import fastconv

from . import bench_conv2d
from .harness import Benchmark


def reference(sizes, input, weight):
    return fastconv.group_conv2d_shuffle_reference(input, weight, None, *_geometry(sizes))


def ours(sizes, input, weight, backend=None, algorithm=None):
    return fastconv.group_conv2d_shuffle(
        input, weight, None, *_geometry(sizes), backend=backend, algorithm=algorithm
    )


def peer(sizes, input, weight):
    output = torch.nn.functional.conv2d(input, weight, None, *_geometry(sizes))
    return torch.nn.functional.channel_shuffle(output, sizes["groups"])


def _geometry(sizes):
    """stride, padding, dilation, groups"""
    return sizes["stride"], sizes["padding"], 1, sizes["groups"]


BENCHMARK = Benchmark(
    op="group_conv2d_shuffle",
    tensors=bench_conv2d.tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=bench_conv2d.macs,
    macs_inside=bench_conv2d.macs_inside,
    ladder="landmarks/240-60@28 k1 g3",
    tiny={
        "batch": 1,
        "channels": 6,
        "filters": 9,
        "height": 4,
        "width": 5,
        "kernel": 1,
        "stride": 1,
        "padding": 0,
        "groups": 3,
    },
    slow=("plain",),
)


def test_group_conv2d_shuffle(contest):
    contest()
