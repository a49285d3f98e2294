"""conv_bn_act in training against ``torch.nn.functional.conv2d``, ``batch_norm`` and ``relu``, in place.

A layer with ``residual`` adds one before relu. A named algorithm is one of the normalisation; the convolution
before it is then the backend's own choice, and gathers no statistics.
"""

from __future__ import annotations

import torch

import fastconv
from fastconv.ops.conv_bn_act import batch_norm_act

from . import bench_conv2d
from .harness import Benchmark
from .windows import outputs

MOMENTUM, EPS = 0.1, 1e-5


def tensors(sizes, generator):
    filters, stride, padding = sizes["filters"], sizes["stride"], sizes["padding"]
    input, weight = bench_conv2d.tensors(sizes, generator)
    bn_weight = 0.5 + torch.rand(filters, generator=generator)
    # No sum is near relu's corner, where rounding decides the gradient: every other channel is all zeros.
    bn_bias = 10.0 * (1 - 2 * (torch.arange(filters) % 2))
    if not sizes.get("residual", 0):
        return input, weight, bn_weight, bn_bias
    height, width = (outputs(sizes[axis], sizes["kernel"], stride, padding) for axis in ("height", "width"))
    residual = torch.randn(sizes["batch"], filters, height, width, generator=generator)
    return input, weight, bn_weight, bn_bias, residual


def reference(sizes, input, weight, bn_weight, bn_bias, residual=None):
    return fastconv.conv_bn_act_reference(
        input, weight, None, None, None, bn_weight, bn_bias, training=True, eps=EPS,
        **_geometry(sizes), residual=residual,
    )  # fmt: skip


def ours(sizes, input, weight, bn_weight, bn_bias, residual=None, backend=None, algorithm=None):
    running = _running(bn_weight)
    if algorithm is None:
        return fastconv.conv_bn_act(
            input, weight, None, *running, bn_weight, bn_bias, training=True, momentum=MOMENTUM, eps=EPS,
            **_geometry(sizes), residual=residual, backend=backend,
        )  # fmt: skip
    if weight.shape[1] == 1 < sizes["groups"]:
        geometry = (sizes["stride"], sizes["padding"])
        sums = fastconv.depthwise_conv2d(input, weight, None, *geometry, backend=backend)
    else:
        sums = fastconv.conv2d(input, weight, None, **_geometry(sizes), backend=backend)
    return batch_norm_act(
        sums, *running, bn_weight, bn_bias, momentum=MOMENTUM, eps=EPS, activation="relu", residual=residual,
        backend=backend, algorithm=algorithm,
    )  # fmt: skip


def peer(sizes, input, weight, bn_weight, bn_bias, residual=None):
    running = _running(bn_weight)
    sums = torch.nn.functional.conv2d(input, weight, None, **_geometry(sizes))
    output = torch.nn.functional.batch_norm(sums, *running, bn_weight, bn_bias, True, MOMENTUM, EPS)
    return torch.relu_(output if residual is None else output.add_(residual))


def _running(bn_weight):
    """running_mean and running_var. New ones for each call: PyTorch's gradient refuses changed ones."""
    return torch.zeros_like(bn_weight), torch.ones_like(bn_weight)


def _geometry(sizes):
    return {name: sizes[name] for name in ("stride", "padding", "groups")}


BENCHMARK = Benchmark(
    op="conv_bn_act",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=bench_conv2d.macs,
    macs_inside=bench_conv2d.macs_inside,
    ladder="landmarks/64-256@56 k1",
    tiny={
        "batch": 2,
        "channels": 4,
        "filters": 6,
        "height": 6,
        "width": 5,
        "kernel": 3,
        "stride": 1,
        "padding": 1,
        "groups": 1,
        "residual": 1,
    },
    products_saved=bench_conv2d.products_saved,
)


def test_conv_bn_act(contest):
    contest()
