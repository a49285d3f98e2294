"""channel_shuffle against ``torch.nn.functional.channel_shuffle``."""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark, no_macs


def tensors(sizes, generator):
    image = (sizes["batch"], sizes["channels"], sizes["height"], sizes["width"])
    return (torch.randn(image, generator=generator),)


def reference(sizes, input):
    return fastconv.channel_shuffle_reference(input, sizes["groups"])


def ours(sizes, input, backend=None, algorithm=None):
    return fastconv.channel_shuffle(input, sizes["groups"], backend=backend, algorithm=algorithm)


def peer(sizes, input):
    return torch.nn.functional.channel_shuffle(input, sizes["groups"])


BENCHMARK = Benchmark(
    op="channel_shuffle",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=no_macs,
    macs_inside=no_macs,
    ladder="landmarks/240@28 g3",
    tiny={"batch": 1, "channels": 6, "height": 4, "width": 5, "groups": 3},
)


def test_channel_shuffle(contest):
    contest()
