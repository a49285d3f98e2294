"""Convolution in Triton: the launchers.

Formula   y[n,m,e,f] = act(b[m] + r[n,m,e,f] + sum_ijc x[n,c,e*sh+i*dh-top,f*sw+j*dw-left] * w[m,c,i,j]).
Program   see conv2d_implicit_gemm.py, conv2d_pointwise.py and conv2d_grad_weight.py.
Bytes     read N*C*H*W, write N*M*E*F; a weight that is not channels_last is copied first.
Differs   "pointwise" leaves out what a 1x1 convolution of stride 1 does not need; not in grad_weight.
Limits    a launch has at most 2^31-1 programs; sums in float32 (float64 for float64), in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from fastconv.ops._arguments import output_size
from fastconv.ops._convolution import format_of_weight
from fastconv.ops._operator import memory_format_of, new_output, sum_type
from fastconv.ops.conv2d import choose

from ._common import COMPILE_OPTIONS, in_memory_format, on_device_of
from ._moments import merge_parts, moments_merge_kernel
from .conv2d_grad_weight import (
    conv2d_implicit_gemm_grad_weight_kernel,
    conv2d_implicit_gemm_grad_weight_sum_kernel,
)
from .conv2d_implicit_gemm import (
    conv2d_implicit_gemm_forward_kernel,
    conv2d_implicit_gemm_grad_input_kernel,
)
from .conv2d_launch import (
    arithmetic,
    bundle_size,
    index_type,
    launch_grad_input,
    launch_implicit_gemm,
    launch_pointwise,
    limits,
    require,
    shape_of_taps,
)
from .conv2d_pointwise import conv2d_pointwise_forward_kernel

GRAD_WEIGHT_PROGRAMS = 528  # four for each multiprocessor of a large GPU


def conv2d_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (M,)
    residual: torch.Tensor | None,  # (N, M, E, F)
    packed: torch.Tensor | None,  # None: the kernels read the weight itself
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    algorithm: str | None,  # "implicit_gemm" (None is that) or "pointwise"
) -> torch.Tensor:
    """``fastconv::conv2d.triton``: (N, M, E, F) in the input's memory format."""
    geometry = (stride, padding, dilation, groups)
    output = _new_output(input, weight, *geometry, algorithm)
    if output.numel():
        with on_device_of(input):
            _launch(input, weight, bias, residual, output, *geometry, activation, algorithm)
    return output


def conv2d_moments_triton(
    input: torch.Tensor,  # (N, C, H, W), not empty
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (M,)
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    groups: int,
    algorithm: str | None,  # "implicit_gemm" (None is that) or "pointwise"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::conv2d_moments.triton``: the convolution, mean and biased variance of its channels."""
    geometry = (stride, padding, dilation, groups)
    output = _new_output(input, weight, *geometry, algorithm)
    with on_device_of(input):
        partial = _launch(input, weight, bias, None, output, *geometry, None, algorithm, gathers=True)
        return output, *merge_parts(moments_merge_kernel, partial)


def _new_output(input, weight, stride, padding, dilation, groups, algorithm) -> torch.Tensor:
    require(choose.why_not("triton", algorithm, input, weight, stride, padding, dilation, groups))
    height = output_size(input.shape[2], weight.shape[2], stride[0], sum(padding[:2]), dilation[0])
    width = output_size(input.shape[3], weight.shape[3], stride[1], sum(padding[2:]), dilation[1], "width")
    return new_output(input, (input.shape[0], weight.shape[0], height, width))


def _launch(
    input,
    weight,
    bias,
    residual,
    output,
    stride,
    padding,
    dilation,
    groups,
    activation,
    algorithm,
    gathers=False,
) -> torch.Tensor | None:
    operands = (input, weight, bias, residual, output)
    if algorithm == "pointwise":
        rest = (groups, activation, False)
        return launch_pointwise(conv2d_pointwise_forward_kernel, *operands, *rest, gathers=gathers)
    rest = (stride, padding, dilation, groups, activation)
    return launch_implicit_gemm(conv2d_implicit_gemm_forward_kernel, *operands, *rest, gathers=gathers)


def conv2d_backward_triton(
    grad_output: torch.Tensor,  # (N, M, E, F)
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    groups: int,
    algorithm: str | None,  # "implicit_gemm" (None is that) or "pointwise"
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::conv2d_backward.triton``: the gradients; one not needed is an empty tensor."""
    require(choose.why_not("triton", algorithm, input, weight, stride, padding, dilation, groups))
    grad_input, grad_weight, grad_bias = (input.new_empty(0) for _ in range(3))  # outputs must not alias
    with on_device_of(input):
        if need_input:
            grad_input = new_output(input, input.shape)
            if grad_input.numel() and algorithm == "pointwise":
                launch_pointwise(
                    conv2d_pointwise_forward_kernel,
                    *(grad_output, weight, None, None, grad_input, groups, None, True),
                )
            elif grad_input.numel():
                launch_grad_input(
                    conv2d_implicit_gemm_grad_input_kernel,
                    *(
                        grad_output,
                        weight,
                        None,
                        grad_input,
                        stride,
                        padding[0],
                        padding[2],
                        dilation,
                        groups,
                    ),
                )
        if need_weight:
            grad_weight = _grad_weight(grad_output, input, weight, stride, padding, dilation, groups)
            grad_weight = grad_weight.contiguous(memory_format=format_of_weight(weight))
        if need_bias:
            # One pass over grad_output, whose speed memory sets: PyTorch's own sum, in an order as fixed.
            grad_bias = grad_output.sum((0, 2, 3), dtype=sum_type(input.dtype)).to(input.dtype)
    return grad_input, grad_weight, grad_bias


def _grad_weight(grad_output, input, weight, stride, padding, dilation, groups) -> torch.Tensor:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if grad_weight.numel() == 0 or grad_output.numel() == 0:
        return grad_weight.zero_()
    memory_format = memory_format_of(input)
    channels_last = memory_format == torch.channels_last
    input, grad_output = (in_memory_format(tensor, memory_format) for tensor in (input, grad_output))
    batch, out_channels, *out_size = grad_output.shape
    in_group, taps = weight.shape[1], weight.shape[2] * weight.shape[3]
    bundle = bundle_size(groups, in_group, out_channels // groups)
    bundles = groups // bundle
    channels, filters = input.shape[1] // bundles, out_channels // bundles
    factors = arithmetic(input.dtype)
    limit = limits(input.dtype, factors["PRECISION"], channels_last, channels, filters)
    tile = limit.tile(filters, taps * channels, copies=1, programs=1)
    programs = triton.cdiv(filters, tile[0]) * triton.cdiv(taps * channels, tile[1]) * bundles

    # One program adds up a slice; there are enough programs to fill a GPU, and no more to save workspace.
    pixels = batch * out_size[0] * out_size[1]
    slices = max(1, min(GRAD_WEIGHT_PROGRAMS // programs, triton.cdiv(pixels, limit.step)))
    slice_length = triton.cdiv(triton.cdiv(pixels, slices), limit.step) * limit.step
    slices = triton.cdiv(pixels, slice_length)
    partial = torch.empty((slices, *weight.shape), dtype=sum_type(input.dtype), device=input.device)
    conv2d_implicit_gemm_grad_weight_kernel[(programs, slices)](
        grad_output, input, partial, *grad_output.stride(), *input.stride(),
        batch, *input.shape[2:], *out_size, padding[0], padding[2], slice_length,
        bundles, channels, filters, CHANNELS_LAST=channels_last, BUNDLE=bundle,
        INDEX=index_type(grad_output, input), PIXELS=limit.step, FILTERS=tile[0], COLUMNS=tile[1],
        **shape_of_taps(weight, stride, dilation), **factors, **limit.options(tile), **COMPILE_OPTIONS,
    )  # fmt: skip
    rows = min(32, triton.next_power_of_2(slices))
    block = 1024 // rows
    conv2d_implicit_gemm_grad_weight_sum_kernel[(triton.cdiv(grad_weight.numel(), block),)](
        partial, grad_weight, slices, grad_weight.numel(), in_group,
        TAPS=taps, SUM=factors["SUM"], SLICES=rows, BLOCK=block, num_warps=4, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad_weight
