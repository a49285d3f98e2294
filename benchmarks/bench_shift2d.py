"""shift2d against PyTorch's depthwise convolution with one 1 in each filter."""

from __future__ import annotations

import functools

import torch

import fastconv

from .harness import Benchmark, no_macs


@functools.cache
def offsets(channels, kernel):
    return fastconv.nn.Shift2d(channels, kernel).offsets


@functools.cache
def filters(channels, kernel, dtype, device):
    weight = torch.zeros(channels, 1, kernel, kernel, dtype=dtype, device=device)
    row, column = (offsets(channels, kernel) + kernel // 2).unbind(1)
    weight[torch.arange(channels), 0, row, column] = 1
    return weight


def tensors(sizes, generator):
    image = (sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])
    return (torch.randn(image, generator=generator),)


def reference(sizes, input):
    return fastconv.shift2d_reference(input, offsets(sizes["channels"], sizes["kernel"]))


def ours(sizes, input, backend=None, algorithm=None):
    given = offsets(sizes["channels"], sizes["kernel"])
    return fastconv.shift2d(input, given, backend=backend, algorithm=algorithm)


def peer(sizes, input):
    channels, kernel = sizes["channels"], sizes["kernel"]
    weight = filters(channels, kernel, input.dtype, input.device)
    return torch.nn.functional.conv2d(input, weight, padding=kernel // 2, groups=channels)


BENCHMARK = Benchmark(
    op="shift2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=no_macs,
    macs_inside=no_macs,
    ladder="landmarks/256@56 k3",
    tiny={"batch": 1, "channels": 9, "height": 4, "width": 5, "kernel": 3},
)


def test_shift2d(contest):
    contest()
