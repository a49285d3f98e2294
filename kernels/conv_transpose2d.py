"""Transposed convolution in Triton: the launcher of what is also the gradient of a convolution's input.

Formula   y[n,c,h,w] = b[c] + sum_ijm x[n,m,e,f] * w[m,c,i,j], h = e*sh+i*dh-ph, w = f*sw+j*dw-pw.
Program   see conv2d_implicit_gemm.py and conv2d_pointwise.py: all stride phases in one launch.
Bytes     read N*M*E*F, write N*C*H*W; a weight that is not channels_last is copied first.
Limits    a launch has at most 2^31-1 programs; sums in float32 (float64 for float64), in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastconv.ops._operator import new_output
from fastconv.ops.conv_transpose2d import choose, output_size

from ._common import on_device_of
from .conv2d_implicit_gemm import conv2d_implicit_gemm_grad_input_kernel
from .conv2d_launch import launch_grad_input, launch_pointwise, require
from .conv2d_pointwise import conv2d_pointwise_forward_kernel


def conv_transpose2d_forward_triton(
    input: torch.Tensor,  # (N, M, E, F)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (C,)
    packed: torch.Tensor | None,  # None: the kernels read the weight itself
    stride: Sequence[int],
    padding: Sequence[int],  # height, width
    output_padding: Sequence[int],  # height, width
    dilation: Sequence[int],
    groups: int,
    algorithm: str | None,  # "implicit_gemm" (None is that) or "pointwise"
) -> torch.Tensor:
    """``fastconv::conv_transpose2d.triton``: (N, C, H, W) in the input's memory format."""
    geometry = stride, padding, output_padding, dilation, groups
    require(choose.why_not("triton", algorithm, input, weight, *geometry))
    axes = zip(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    sizes = [output_size(*axis, name) for axis, name in zip(axes, ("height", "width"))]
    output = new_output(input, (input.shape[0], weight.shape[1] * groups, *sizes))
    if output.numel() == 0:
        return output
    with on_device_of(input):
        if algorithm == "pointwise":
            launch_pointwise(
                conv2d_pointwise_forward_kernel,
                *(input, weight, bias, None, output, groups, None, True),
            )
        else:
            launch_grad_input(
                conv2d_implicit_gemm_grad_input_kernel,
                *(input, weight, bias, output, stride, *padding, dilation, groups),
            )
    return output
