"""conv2d against ``torch.nn.functional.conv2d``.

A layer with ``fused`` has a bias, a residual and relu: fastconv folds them in, PyTorch computes one after the
other, in place.
"""

from __future__ import annotations

import torch

import fastconv

from .harness import Benchmark
from .windows import outputs, taps_inside


def tensors(sizes, generator):
    channels, kernel = sizes["channels"] // _groups(sizes), sizes["kernel"]
    weight = torch.randn(sizes["filters"], channels, kernel, kernel, generator=generator)
    found = [
        torch.randn(sizes["batch"], sizes["channels"], sizes["height"], sizes["width"], generator=generator),
        weight / (channels**0.5 * kernel),
    ]
    if _fused(sizes):
        found.append(torch.randn(sizes["filters"], generator=generator))
        total = torch.nn.functional.conv2d(*found, sizes["stride"], sizes["padding"], groups=_groups(sizes))
        residual = torch.randn(total.shape, generator=generator)
        # No sum is near relu's corner, where rounding decides the gradient.
        found.append(residual + 0.2 * (total + residual).sign())
    return tuple(found)


def reference(sizes, input, weight, bias=None, residual=None):
    return fastconv.conv2d_reference(input, weight, bias, *_geometry(sizes), **_epilogue(sizes, residual))


def ours(sizes, input, weight, bias=None, residual=None, backend=None, algorithm=None):
    return fastconv.conv2d(
        input,
        weight,
        bias,
        *_geometry(sizes),
        **_epilogue(sizes, residual),
        backend=backend,
        algorithm=algorithm,
    )


def peer(sizes, input, weight, bias=None, residual=None):
    output = torch.nn.functional.conv2d(input, weight, bias, *_geometry(sizes))
    return output if residual is None else torch.relu_(output.add_(residual))


def macs(sizes):
    height, width = (outputs(size, *_window(sizes)) for size in (sizes["height"], sizes["width"]))
    return _pairs(sizes) * height * width * sizes["kernel"] ** 2


def macs_inside(sizes):
    window = _window(sizes)
    rows, columns = (
        taps_inside(outputs(size, *window), size, *window) for size in (sizes["height"], sizes["width"])
    )
    return _pairs(sizes) * rows * columns


def products_saved(sizes):
    """Winograd's F(6 x 6, 3 x 3): 64 products for the 36 * 9 of a tile."""
    return 36 * 9 / 64 if sizes["kernel"] == 3 and sizes["stride"] == 1 else 1.0


def _pairs(sizes):
    """Of a channel and a filter that sees it, in all images."""
    return sizes["batch"] * sizes["filters"] * sizes["channels"] // _groups(sizes)


def _window(sizes):
    return sizes["kernel"], sizes["stride"], sizes["padding"]


def _geometry(sizes):
    """stride, padding, dilation, groups"""
    return sizes["stride"], sizes["padding"], 1, _groups(sizes)


def _groups(sizes):
    return sizes.get("groups", 1)


def _fused(sizes):
    return bool(sizes.get("fused", 0))


def _epilogue(sizes, residual):
    return {"activation": "relu" if _fused(sizes) else None, "residual": residual}


BENCHMARK = Benchmark(
    op="conv2d",
    tensors=tensors,
    reference=reference,
    ours=ours,
    peer=peer,
    macs=macs,
    macs_inside=macs_inside,
    ladder="landmarks/64@56 k3",
    tiny={
        "batch": 1,
        "channels": 4,
        "filters": 6,
        "height": 6,
        "width": 5,
        "kernel": 3,
        "stride": 1,
        "padding": 1,
    },
    ladder_layout="nchw",
    ladder_steps={
        "cpu": ("plain", "im2col", "direct", "grouped", "winograd_f2", "winograd_f4", "winograd_f6"),
        "cuda": ("direct", "im2col", "implicit_gemm"),
    },
    slow=("plain",),
    products_saved=products_saved,
    rounding={"winograd_f6": 4.0},  # its points lie far out: more cancels
)


def test_conv2d(contest):
    contest()
