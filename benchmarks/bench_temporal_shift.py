"""temporal_shift against zeros and three copies of slices, as models written for PyTorch have it."""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark, no_macs

FOLD_DIV = 8


def tensors(sizes, generator):
    image = (sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])
    return (torch.randn(image, generator=generator),)


def reference(sizes, input):
    return fastconv.temporal_shift_reference(input, sizes["segments"], FOLD_DIV)


def ours(sizes, input, backend=None, algorithm=None):
    return fastconv.temporal_shift(input, sizes["segments"], FOLD_DIV, backend=backend, algorithm=algorithm)


def peer(sizes, input):
    output = torch.zeros_like(input)
    clips = (sizes["batch"] // sizes["segments"], sizes["segments"])
    to, frames = output.unflatten(0, clips), input.unflatten(0, clips)
    fold = sizes["channels"] // FOLD_DIV
    to[:, :-1, :fold] = frames[:, 1:, :fold]
    to[:, 1:, fold : 2 * fold] = frames[:, :-1, fold : 2 * fold]
    to[:, :, 2 * fold :] = frames[:, :, 2 * fold :]
    return output


BENCHMARK = Benchmark(
    op="temporal_shift",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=no_macs,
    macs_inside=no_macs,
    ladder="landmarks/256@56 t8",
    tiny={"batch": 4, "channels": 18, "height": 4, "width": 5, "segments": 2},
)


def test_temporal_shift(contest):
    contest()
