"""Grouped convolution with channel shuffle in Triton: the launcher.

Formula   y[n, k*G + g] = act(conv2d(x)[n, g*M/G + k]), g < G, k < M/G.
Program   see conv2d_implicit_gemm.py and conv2d_pointwise.py.
Bytes     those of the convolution: y seen as (N, M/G, G, E, F) has a stride from filter to filter of a group,
          and one from group to group, and the kernels take any strides.
Limits    as conv2d.py; neighbouring filters are G channels apart, so channels_last stores go value by value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastconv.ops._arguments import output_size
from fastconv.ops._operator import new_output
from fastconv.ops.group_conv2d_shuffle import choose

from ._common import on_device_of
from .conv2d_implicit_gemm import conv2d_implicit_gemm_forward_kernel
from .conv2d_launch import launch_implicit_gemm, launch_pointwise, require
from .conv2d_pointwise import conv2d_pointwise_forward_kernel


def group_conv2d_shuffle_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (M,), in the order of the filters
    packed: torch.Tensor | None,  # None: the kernels read the weight itself
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    algorithm: str | None,  # "implicit_gemm" (None is that) or "pointwise"
) -> torch.Tensor:
    """``fastconv::group_conv2d_shuffle.triton``: (N, M, E, F) in the input's memory format."""
    require(choose.why_not("triton", algorithm, input, weight, stride, padding, dilation, groups))
    height = output_size(input.shape[2], weight.shape[2], stride[0], sum(padding[:2]), dilation[0])
    width = output_size(input.shape[3], weight.shape[3], stride[1], sum(padding[2:]), dilation[1], "width")
    output = new_output(input, (input.shape[0], weight.shape[0], height, width))
    if output.numel() == 0:
        return output
    with on_device_of(input):
        if algorithm == "pointwise":
            launch_pointwise(
                conv2d_pointwise_forward_kernel,
                *(input, weight, bias, None, output, groups, activation, False),
                shuffled=True,
            )
        else:
            launch_implicit_gemm(
                conv2d_implicit_gemm_forward_kernel,
                *(input, weight, bias, None, output, stride, padding, dilation, groups, activation),
                shuffled=True,
            )
    return output
